"""Existing shards, such as those of img2dataset: to shuffle them anew, to split them, or to shrink their pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.data.index.tar import Member, read_samples
from clip_train.data.index.walk import picture_of
from clip_train.data.shards.inputs.pair import Absent, Content, Input, InputOptions, Pair
from clip_train.data.source import expand_shards
from clip_train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def read_tars(folder: Path, *, options: InputOptions) -> Input:
    """Take the samples of a folder's shards: picture, `txt`, and `cls` and `json` where they exist.

    Samples without a picture are pairs as well, which cannot be used.

    Raises:
        UserError: no sample holds a picture.
        IntegrityError: a shard is damaged.
    """
    kind = "a folder of shards"
    options.refuse_except(kind=kind)
    pairs = []
    for shard in expand_shards(str(folder)):
        for sample in read_samples(shard):
            picture, caption = picture_of(sample), sample.members.get("txt")
            pairs.append(
                Pair(
                    f"{shard.name}/{sample.key}",
                    Absent(shard) if picture is None else _content(shard, sample.members[picture]),
                    _content(shard, caption) if caption else (),
                    tuple((e, _content(shard, sample.members[e])) for e in ("cls", "json") if e in sample.members),
                )
            )
    if all(isinstance(pair.image, Absent) for pair in pairs):
        raise UserError(f"{folder}: no sample of its shards holds a picture ({', '.join(IMAGE_EXTENSIONS)})")
    return Input(kind=kind, pairs=pairs)


def _content(shard: Path, member: Member) -> Content:
    return Content(shard, member.offset, member.size)
