"""Open a set of images with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImages:
    """Images and their captions, several per image allowed."""

    source: ImageSource
    captions: Sequence[str]
    """All captions, image after image: T of them."""
    owner: np.ndarray
    """[T] int64, the image of each caption, ascending; every image has one."""


def open_captioned_shards(shards: str | Sequence[str], *, split: str = "test") -> CaptionedImages:
    """Open shards whose images have a `.txt` with one caption per line.

    Args:
        shards: patterns of `expand_shards`, or the folder of a set in clip-benchmark's layout.
        split: which part of such a set.

    Raises:
        UserError: the pattern matches no shard, or the set has classes in place of captions.
        IntegrityError: a shard is damaged, or an image has no caption.
    """
    from clip_train.data.sequential import ShardImages
    from clip_train.data.shards.benchmark import Kind, has_layout, kind_of, layout_shards
    from clip_train.data.source import expand_shards

    if isinstance(shards, str) and has_layout(Path(shards), split=split):
        if kind_of(Path(shards)) is not Kind.retrieval:
            raise UserError(f"{shards} holds classes, not captions: evaluate it with evaluation=[classify]")
        paths = layout_shards(Path(shards), split=split)
    else:
        paths = expand_shards(shards, field="evaluation.shards")
    source = ShardImages(paths)
    return captioned_images(source, (source.text(i, "txt").splitlines() for i in range(len(source))))


def captioned_images(source: ImageSource, captions_per_image: Iterable[Sequence[str]]) -> CaptionedImages:
    """Put images and their captions together; empty captions do not count.

    Raises:
        IntegrityError: an image has no caption.
    """
    captions: list[str] = []
    owner: list[int] = []
    for i, own in enumerate(captions_per_image):
        lines = [line.strip() for line in own if line.strip()]
        if not lines:
            raise IntegrityError(f"{source.key(i)} has no caption")
        captions.extend(lines)
        owner.extend([i] * len(lines))
    return CaptionedImages(source=source, captions=captions, owner=np.array(owner, dtype=np.int64))
