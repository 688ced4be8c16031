"""Index existing shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.data.index.files import DEFAULT_CAPTIONS
from clip_train.data.index.walk import IndexOptions, IndexSummary, index_shards
from clip_train.data.remote.config import cache_in
from clip_train.data.remote.mirror import index_remote
from clip_train.data.shard_file import find_files
from clip_train.data.shards.filters import AllRules, MetadataRule, QuarantineRule, parse_condition, read_quarantine
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def index_source(
    path: str | Sequence[str], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, crc: bool = False,
    conditions: Sequence[str] = (), quarantine: Path | None = None, source: str | None = None,
    allow_truncated: bool = False, index_dir: Path | None = None, jobs: int | None = None,
    cache_dir: Path | None = None,
) -> IndexSummary:  # fmt: skip
    """Walk the shards that patterns name and write their index, which then holds what this call keeps and no more.

    Args:
        path: a folder, a pattern or several, as for `data.train`.
        captions: extensions of the members that hold captions, as `data.caption` names them.
        crc: also read every sample and store its crc32, which the loader then checks.
        conditions: what samples must meet to stay, such as `similarity>=0.3`, `width>=200` or `key in ids.txt`.
        quarantine: folder `bad` of a run, whose samples are left out.
        source: name of the source in that run, if it had several.
        allow_truncated: take what comes before the cut of a shard that is cut off.
        index_dir: folder for the index; None puts it beside the shards, also beside remote ones.
        jobs: processes; None chooses by the number of cores and shards.
        cache_dir: where remote shards lie while they are read; None takes the default of `data.cache.dir`.

    Raises:
        UserError: shards are missing, a folder cannot be written, a condition is wrong, or nothing is left.
        IntegrityError: a shard is damaged, or no sample has both a picture and a caption.
    """
    if source is not None and quarantine is None:
        raise UserError("--source chooses among the sources of --quarantine, which is not given")
    rules: list[MetadataRule | QuarantineRule] = []
    if conditions:
        rules.append(MetadataRule(conditions=tuple(map(parse_condition, conditions))))
    if quarantine is not None:
        rules.append(read_quarantine(quarantine, source=source))
    rule = AllRules(rules=tuple(rules)) if rules else None
    files = find_files(path, field="shards", cache=cache_in(cache_dir))
    if files[0].cache is not None:
        options = IndexOptions(captions=captions, crc=crc, rule=rule, allow_truncated=allow_truncated)
        return index_remote(files, options=options, jobs=jobs or 1, index_dir=index_dir)
    return index_shards(
        [file.path for file in files], captions=captions, crc=crc, rule=rule, allow_truncated=allow_truncated,
        index_dir=index_dir, jobs=jobs,
    )  # fmt: skip
