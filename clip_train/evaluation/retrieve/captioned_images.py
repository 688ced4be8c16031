"""Open a set of images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import IntegrityError

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


def open_captioned_images(shards: str | Sequence[str]) -> CaptionedImages:
    """Open shards whose images have a `.txt` with one caption per line.

    Raises:
        UserError: the pattern matches no shard.
        IntegrityError: a shard is damaged, or an image has no caption.
    """
    from clip_train.data.sequential import ShardImages
    from clip_train.data.source import expand_shards

    source = ShardImages(expand_shards(shards, field="evaluation.shards"))
    captions: list[str] = []
    owner: list[int] = []
    for i in range(len(source)):
        lines = [line.strip() for line in source.text(i, "txt").splitlines() if line.strip()]
        if not lines:
            raise IntegrityError(f"{source.key(i)} has no caption: its .txt is empty")
        captions.extend(lines)
        owner.extend([i] * len(lines))
    return CaptionedImages(source=source, captions=captions, owner=np.array(owner, dtype=np.int64))
