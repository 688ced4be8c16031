"""Find the shards that a pattern names, and open them as a source: a named, ordered list of indexed shards."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.index.files import DEFAULT_CAPTIONS, ShardEntry, fingerprint, load_index
from clip_train.data.index.walk import index_shards
from clip_train.data.remote.index import load_remote_index
from clip_train.distributed.agree import on_main
from clip_train.errors import UserError, first_of
from clip_train.redact import has_login, unsigned
from clip_train.storage.remote import PIPE, check_scheme, common_folder, is_remote, list_shards, with_lower_scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.data.remote.cache import ShardCache
    from clip_train.distributed.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Shards in the order that gives each its number, by the UTF-8 bytes of their names below `root`."""

    name: str
    root: str  # folder or URL
    shards: tuple[ShardEntry, ...]
    captions: tuple[str, ...] = DEFAULT_CAPTIONS  # extensions of the members that hold captions
    cache: ShardCache | None = None  # where remote shards are read
    patterns: tuple[str, ...] = ()  # what named the shards

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
        listed = ((self.shard_name(i), s) for i, s in enumerate(self.shards))
        return fingerprint(listed, captions=self.captions)

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard below `root`. A signature is no part of it: a renewed one names the same shard."""
        return unsigned(_below(self.shards[shard].location, self.root))


def expand_shards(patterns: str | Sequence[str], *, field: str = "shards") -> list[Path]:
    """Return the local shards that patterns name, as absolute paths in order of their names, each once.

    A pattern may hold braces (`train-{000..009}.tar`), `~`, `$NAME`, globs and `::` between several; a folder means
    its `*.tar`.

    Args:
        patterns: one pattern or several.
        field: what to call the patterns in messages, such as `data.train`.

    Raises:
        UserError: nothing matches, a named file does not exist, or a shard is remote.
    """
    locations = find_shards(patterns, field=field)
    remote = next((location for location in locations if is_remote(location)), None)
    if remote is not None:
        raise UserError(f"{field}={remote}: shards must be local files here")
    return [Path(location) for location in locations]


def find_shards(patterns: str | Sequence[str], *, field: str, public_only: bool = False) -> list[str]:
    """Return the shards that patterns name, local or remote, in order of their names, each once.

    Local paths are absolute. Patterns are those of `expand_shards`; remote globs and folders need a place that lists,
    at a public address if `public_only`.

    Raises:
        UserError: nothing matches, a local file does not exist, a scheme is not known, or local and remote are mixed.
        IntegrityError: a remote folder cannot be reached.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in _expanded(patterns, field=field):
        if name.startswith(PIPE):
            raise UserError(f"{field}={name}: commands cannot be indexed; data.reader=streaming reads them")
        if is_remote(name):
            matches = _remote_matches(name, field=field, public_only=public_only)
        else:
            matches = _local_matches(name, field=field)
        if not matches:
            is_folder = bool(name) and not is_remote(name) and Path(name).is_dir()
            missing.append(f"{name}/*.tar" if is_folder else name or "''")
        found += matches
    if missing:
        raise UserError(f"{field}={patterns}: not found: {first_of(missing, most=5)}")
    if not found:
        raise UserError(f"{field}={patterns} names no shards")
    if len({is_remote(name) for name in found}) > 1:
        raise UserError(f"{field}={patterns} names local and remote shards: make them two sources")
    return _in_order(found, field=field)


def find_streams(patterns: str | Sequence[str], *, field: str, allow_pipe: bool) -> list[str]:
    """Return the shards to read as streams, each once, in order: files, URLs and commands (`pipe:COMMAND`).

    Raises:
        UserError: nothing matches, a scheme is not known, or a command is named and not allowed.
    """
    found: list[str] = []
    for name in _expanded(patterns, field=field):
        if not name.startswith(PIPE):
            found += find_shards(name, field=field)
        elif allow_pipe:
            found.append(name)
        else:
            raise UserError(f"{field}={name} runs a command in a shell: say data.allow_pipe=true if that is meant")
    return sorted(set(found), key=os.fsencode)


def _expanded(patterns: str | Sequence[str], *, field: str) -> list[str]:
    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # An existing path may hold any character; os.path also takes patterns too long to be a path.
        elsewhere = is_remote(pattern) or pattern.startswith(PIPE)
        local = with_lower_scheme(pattern) if elsewhere else _at_home(pattern)
        if os.path.exists(local):  # noqa: PTH110
            names.append(local)
            continue
        from webdataset.shardlists import expand_urls  # imports torch, which a folder's index does without

        try:
            names += expand_urls(local)
        except ValueError as error:  # of braces that do not match
            raise UserError(f"{field}={pattern}: {error}") from error
    return names


def _at_home(pattern: str) -> str:
    """Put the home folder and the environment's values into a local pattern. Never into a URL: it would send them."""
    return os.path.expandvars(os.path.expanduser(pattern))  # noqa: PTH111


def _local_matches(name: str, *, field: str) -> list[str]:
    path = Path(name)
    try:
        if not name:
            matches = []
        elif path.is_dir():
            matches = sorted(path.glob("*.tar"))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    except (ValueError, OSError) as error:
        raise UserError(f"{field}={name!r} is neither a path nor a pattern: {error}") from error
    return [os.path.abspath(match) for match in matches]  # noqa: PTH100 - links keep their own names


def _remote_matches(name: str, *, field: str, public_only: bool) -> list[str]:
    check_scheme(name, field=field)
    if has_login(name):
        raise UserError(f"{field}={unsigned(name)}: put the password into ~/.netrc, where no process list shows it")
    base = name.partition("?")[0]  # of a signed URL
    return [name] if base.endswith(".tar") and "*" not in base else list_shards(name, public_only=public_only)


def open_source(
    patterns: str | Sequence[str], *, name: str, world: World, field: str, captions: tuple[str, ...] = DEFAULT_CAPTIONS,
    index_dir: Path | None = None, cache: ShardCache | None = None, counts_from_stats: bool = False,
) -> Source:  # fmt: skip
    """Open the shards that patterns name. Every rank calls it; rank 0 indexes the shards that have no index.

    Args:
        patterns: as for `find_shards`.
        name: of the source; decides its order.
        world: all ranks.
        field: what to call the patterns in messages.
        captions: extensions of the members that hold captions; a sample has all of them.
        index_dir: where the index is, None beside the shards.
        cache: where remote shards are read; without it they are refused.
        counts_from_stats: take the counts of remote shards from img2dataset where they have no index.

    Raises:
        UserError: shards are missing, or their folder cannot be written and they have no index.
        IntegrityError: a shard or an index is damaged, or does not arrive.
    """

    def act() -> Source:
        locations = find_shards(patterns, field=field, public_only=cache is not None and cache.public_only)
        if not is_remote(locations[0]):
            return replace(
                _open(locations, name=name, field=field, captions=captions, index_dir=index_dir), patterns=named
            )
        if cache is None:
            raise UserError(f"{field}={patterns}: shards must be local files here")
        entries = load_remote_index(
            locations, cache=cache, captions=captions, counts_from_stats=counts_from_stats, field=field,
            index_dir=index_dir,
        )  # fmt: skip
        root = _common_folder(locations)
        return Source(
            name=name, root=root, shards=tuple(entries), captions=captions, cache=cache, patterns=named
        )  # fmt: skip

    named = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return on_main(act, world=world)


def warn_of_shared_shards(sources: Sequence[Source], *, val: Sequence[str]) -> None:
    """Say which shards several sources have, and which are held out besides."""
    uses = Counter(shard.location for source in sources for shard in source.shards)
    repeated, held_out = [location for location, count in uses.items() if count > 1], uses.keys() & set(val)
    if repeated:
        what = "data.train: %d shards are in several sources, such as %s: a batch may hold a sample twice"
        logger.warning(what, len(repeated), min(repeated))
    if held_out:
        what = "data.val: %d shards are also in data.train, such as %s: held-out results will be too good"
        logger.warning(what, len(held_out), min(held_out))


def _open(
    locations: Sequence[str], *, name: str, field: str, captions: tuple[str, ...], index_dir: Path | None
) -> Source:
    shards = [Path(location) for location in locations]
    entries, missing = load_index(shards, captions=captions, index_dir=index_dir)
    if missing:
        logger.info("%s: indexing %d of %d shards", field, len(missing), len(shards))
        if any(entry.filter_sha256 for entry in entries):
            logger.warning(
                "%s: %d new shards are not filtered as the others are: run `shards index`", field, len(missing)
            )
        summary = index_shards(missing, captions=captions, index_dir=index_dir)
        for parts, count in summary.skipped.items():
            logger.warning("%s: %d samples have only %s and are left out", field, count, parts)
        entries, _ = load_index(shards, captions=captions, index_dir=index_dir)
    return Source(name=name, root=_common_folder(locations), shards=tuple(entries), captions=captions)


def _in_order(locations: list[str], *, field: str) -> list[str]:
    unique = list(dict.fromkeys(locations))
    if len(unique) < len(locations):
        logger.warning("%s: %d shards are listed twice and used once", field, len(locations) - len(unique))
    root = _common_folder(unique)
    return sorted(unique, key=lambda location: os.fsencode(_below(location, root)))


def _common_folder(locations: Sequence[str]) -> str:
    if is_remote(locations[0]):
        return common_folder(locations)
    return os.path.commonpath([os.path.dirname(location) for location in locations])  # noqa: PTH120


def _below(location: str, root: str) -> str:
    return location.removeprefix(root).lstrip("/")
