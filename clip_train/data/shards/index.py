"""Index existing shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.data.index import DEFAULT_CAPTIONS, IndexSummary, index_shards
from clip_train.data.source import expand_shards

if TYPE_CHECKING:
    from collections.abc import Sequence


def index_source(
    path: str | Sequence[str], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, crc: bool = False,
    jobs: int | None = None,
) -> IndexSummary:  # fmt: skip
    """Walk the shards that patterns name and write their index beside them.

    Args:
        path: a folder, a pattern or several, as for `data.train`.
        captions: extensions of the members that hold captions, as `data.caption` names them.
        crc: also read every sample and store its crc32, which the loader then checks.
        jobs: processes; None chooses by the number of cores and shards.

    Raises:
        UserError: shards are missing, or a folder cannot be written.
        IntegrityError: a shard is damaged, or no sample has both a picture and a caption.
    """
    return index_shards(expand_shards(path), captions=captions, crc=crc, jobs=jobs)
