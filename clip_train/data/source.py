"""Find the shards that a pattern names, and open them as a source: a named, ordered list of indexed shards."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.index import DEFAULT_CAPTIONS, ShardEntry, fingerprint, load_index
from clip_train.data.indexing import index_shards
from clip_train.distributed.collectives import broadcast_object
from clip_train.errors import ClipTrainError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.distributed.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Shards in the order that gives each its number, by the UTF-8 bytes of their names below `root`."""

    name: str
    root: Path
    shards: tuple[ShardEntry, ...]
    captions: tuple[str, ...] = DEFAULT_CAPTIONS  # extensions of the members that hold captions

    @property
    def counts(self) -> list[int]:
        """Samples per shard."""
        return [shard.n for shard in self.shards]

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """sha256 that changes with names, counts, sizes, filters and caption members, not with the shards' folder."""
        listed = ((self.shard_name(i), shard) for i, shard in enumerate(self.shards))
        return fingerprint(listed, captions=self.captions)

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard below `root`."""
        return self.shards[shard].path.relative_to(self.root).as_posix()


def expand_shards(patterns: str | Sequence[str], *, field: str = "shards") -> list[Path]:
    """Return the shards that patterns name, as absolute paths in order of their names, each once.

    A pattern may hold braces (`train-{000..009}.tar`), `~`, globs and `::` between several; a folder means its `*.tar`.

    Args:
        patterns: one pattern or several.
        field: what to call the patterns in messages, such as `data.train`.

    Raises:
        UserError: nothing matches, or a named file does not exist.
    """
    from webdataset.shardlists import expand_urls

    found: list[Path] = []
    missing: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # An existing path may hold any character; os.path also takes patterns too long to be a path.
        literal = os.path.exists(os.path.expanduser(pattern))  # noqa: PTH110, PTH111
        for name in [pattern] if literal else expand_urls(pattern):
            _refuse_remote(name, field=field)
            path = Path(name).expanduser()
            if path.is_dir():
                matches = sorted(path.glob("*.tar"))
            elif path.exists():
                matches = [path]
            else:
                matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            if not matches:
                missing.append(f"{path}/*.tar" if path.is_dir() else str(path))
            found += matches
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{field}={patterns}: not found: {', '.join(missing[:5])}{rest}")
    if not found:
        raise UserError(f"{field}={patterns} names no shards")
    return _in_order(found, field=field)


def open_source(
    patterns: str | Sequence[str], *, name: str, world: World, field: str,
    captions: tuple[str, ...] = DEFAULT_CAPTIONS, index_dir: Path | None = None,
) -> Source:  # fmt: skip
    """Open the shards that patterns name. Every rank calls it; rank 0 indexes the shards that have no index.

    Args:
        patterns: as for `expand_shards`.
        name: of the source; decides its order.
        world: all ranks.
        field: what to call the patterns in messages.
        captions: extensions of the members that hold captions; a sample has all of them.
        index_dir: where the index is, None beside the shards.

    Raises:
        UserError: shards are missing, or their folder cannot be written and they have no index.
        IntegrityError: a shard or an index is damaged.
    """
    outcome: Source | ClipTrainError | None = None
    if world.is_main:
        try:
            outcome = _open(patterns, name=name, field=field, captions=captions, index_dir=index_dir)
        except ClipTrainError as error:
            outcome = error  # raised on every rank, so that none waits for the others
    outcome = broadcast_object(outcome, world=world)
    if isinstance(outcome, ClipTrainError):
        raise outcome
    assert outcome is not None
    return outcome


def _open(
    patterns: str | Sequence[str], *, name: str, field: str, captions: tuple[str, ...], index_dir: Path | None
) -> Source:
    shards = expand_shards(patterns, field=field)
    entries, missing = load_index(shards, captions=captions, index_dir=index_dir)
    if missing:
        logger.info("%s: indexing %d of %d shards", field, len(missing), len(shards))
        summary = index_shards(missing, captions=captions, index_dir=index_dir)
        for parts, count in summary.skipped.items():
            logger.warning("%s: %d samples have only %s and are left out", field, count, parts)
        entries, _ = load_index(shards, captions=captions, index_dir=index_dir)
    return Source(name=name, root=_common_folder(shards), shards=tuple(entries), captions=captions)


def _in_order(paths: list[Path], *, field: str) -> list[Path]:
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - links keep their own names
    unique = dict.fromkeys(absolute)
    if len(unique) < len(absolute):
        logger.warning("%s: %d shards are listed twice and used once", field, len(absolute) - len(unique))
    root = _common_folder(list(unique))
    return sorted(unique, key=lambda path: os.fsencode(path.relative_to(root).as_posix()))


def _common_folder(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _refuse_remote(name: str, *, field: str) -> None:
    scheme = name.split(":", 1)[0] if ":" in name else ""
    if scheme == "pipe" or "://" in name:
        raise UserError(f"{field}={name}: shards must be local files")
