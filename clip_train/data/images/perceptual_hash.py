"""What a picture looks like in a few numbers, which survive resizing and another encoding."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

NUM_BITS = 64
THUMBNAIL_SIDE = 16
_FREQUENCIES = 8
_GREY_SIDE = 32
_FLAT = 2.0  # spread of grey values below which there is nothing to know a picture by


class Fingerprint(NamedTuple):
    """The hash and the thumbnail of a picture."""

    bits: np.ndarray  # [64] int8, 1 or -1
    thumbnail: np.ndarray  # [16, 16, 3] uint8


def fingerprint(pixels: np.ndarray) -> Fingerprint | None:
    """Return the fingerprint of a picture, uint8 [H, W, 3]; None if it has a single colour or nearly so.

    The bits say which of the 8 x 8 lowest frequencies of the cosine transform of the grey picture, 32 x 32 pixels, lie
    above their median (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", §3.2.1).
    """
    picture = Image.fromarray(pixels)
    grey = picture.convert("L").resize((_GREY_SIDE, _GREY_SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    values = np.asarray(grey, dtype=np.float64)
    if values.std() < _FLAT:
        return None
    cosines = _cosines()
    low = cosines @ values @ cosines.T  # [8, 8]
    bits = np.where(low > np.median(low), 1, -1).astype(np.int8).ravel()
    thumbnail = picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, reducing_gap=3)
    return Fingerprint(bits, np.asarray(thumbnail))


def distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return how many bits differ, [n, m] int64, of bits [n, 64] and [m, 64]."""
    same_less_different = ours.astype(np.float32) @ theirs.astype(np.float32).T
    return ((NUM_BITS - same_less_different) / 2).round().astype(np.int64)


def likeness(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the correlation [n] of thumbnails [n, 16, 16, 3] with those at the same place in `theirs`."""
    return (_standardised(ours) * _standardised(theirs)).sum(axis=1)


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    values -= values.mean(axis=1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)


@functools.cache
def _cosines() -> np.ndarray:
    """Return the lowest frequencies of the cosine transform of type II, [8, 32]."""
    place = np.arange(_GREY_SIDE) + 0.5
    return np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), place) / _GREY_SIDE)
