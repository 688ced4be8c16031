"""Open a set of images with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.data.caption_fields import CaptionField, parse_caption_fields
from clip_train.data.captions import all_captions
from clip_train.data.images.decode import BadSampleError
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from clip_train.data.remote.cache import ShardCache
    from clip_train.data.sequential import ImageSource, ShardImages


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImages:
    """Images and their captions, several per image allowed."""

    source: ImageSource
    captions: Sequence[str]
    """All captions, image after image: T of them."""
    owner: np.ndarray
    """[T] int64, the image of each caption, ascending; every image has one."""


def open_captioned_shards(
    shards: str | Sequence[str], *, caption: object = "txt", split: str = "test", cache: ShardCache | None = None
) -> CaptionedImages:
    """Open shards whose images have captions: lines of a `.txt`, or fields of a `.json`.

    Args:
        shards: patterns of `find_shards`, or the folder of a set in clip-benchmark's layout.
        caption: as `data.caption`.
        split: which part of such a set.
        cache: where remote shards are read; without it they are refused.

    Raises:
        UserError: the pattern matches no shard, or the set has classes in place of captions.
        IntegrityError: a shard is damaged, or an image has no caption.
    """
    from clip_train.data.sequential import ShardImages
    from clip_train.data.shard_file import find_files
    from clip_train.data.shards.benchmark import Kind, has_layout, kind_of, layout_shards

    if isinstance(shards, str) and has_layout(Path(shards), split=split):
        if kind_of(Path(shards)) is not Kind.retrieval:
            raise UserError(f"{shards} holds classes, not captions: evaluate it with evaluation=[classify]")
        source = ShardImages(layout_shards(Path(shards), split=split))
    else:
        source = ShardImages(find_files(shards, field="shards", cache=cache))
    fields = parse_caption_fields(caption, None)
    return captioned_images(source, (_captions(source, i, fields=fields) for i in range(len(source))))


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


def _captions(source: ShardImages, index: int, *, fields: Sequence[CaptionField]) -> list[str]:
    try:
        own = [all_captions(source.content(index, field.extension), field=field) for field in fields]
    except BadSampleError as error:
        raise IntegrityError(f"{source.key(index)} has no caption: {error.reason}") from error
    return [caption for captions in own for caption in captions]
