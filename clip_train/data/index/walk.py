"""The index pass: walk shards, keep what is a sample and passes the rule, write `.idx` and `index.json`."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol
from uuid import uuid4

import numpy as np

from clip_train.data.files import one_writer, part_of, publish, write_part
from clip_train.data.index.files import (
    CAPTION_CHOICES,
    DEFAULT_CAPTIONS,
    HAS_CRC,
    IMAGE_EXTENSIONS,
    ShardEntry,
    idx_path,
    index_folder,
    read_listing,
    record_layout,
    write_listing,
)
from clip_train.data.index.jobs import run_jobs
from clip_train.data.index.tar import BLOCK, TarSample, read_samples
from clip_train.errors import IntegrityError, UserError, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_JOBS_PAY_FROM = 8  # shards; below that, starting processes costs more than it saves


class SampleRule(Protocol):
    """Decides which pairs of a shard become samples. Instances can be pickled."""

    def __call__(self, shard: Path, pairs: Sequence[TarSample]) -> list[str | None]:
        """Return for each pair the reason for which it is left out, None for those that stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """How shards are indexed."""

    captions: tuple[str, ...] = DEFAULT_CAPTIONS
    """Extensions of the members that hold captions; a sample has all of them."""
    crc: bool = False
    """Read every sample and store its crc32. Without it, checksums that an unchanged shard has are kept."""
    rule: SampleRule | None = None
    """What leaves pairs out; None keeps all."""
    allow_truncated: bool = False
    """Take the samples before the cut of a shard that is cut off."""
    index_dir: Path | None = None
    """Folder for the index where that of the shards cannot be written; None puts it beside them."""
    attempt: str = field(default_factory=lambda: uuid4().hex)
    """Names the records under way: two runs may begin to index the same shards."""

    def __post_init__(self) -> None:
        if self.captions not in CAPTION_CHOICES:
            choices = ", ".join("+".join(choice) for choice in CAPTION_CHOICES)
            raise UserError(f"captions={'+'.join(self.captions)} must be one of {choices}")


class IndexedShard(NamedTuple):
    """What an index pass found in one shard. Its records wait as `.part` for the other shards'."""

    entry: ShardEntry
    incomplete: Counter[str]  # samples without picture or caption, by what they consist of
    left_out: Counter[str]  # pairs by the rule's reason
    cut: str | None  # message, if the shard is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSummary:
    """What an index pass found."""

    shards: tuple[ShardEntry, ...]
    skipped: dict[str, int]  # incomplete samples by what they consist of, such as "jpg" or "cls+jpg"
    left_out: dict[str, int] = field(default_factory=dict)  # pairs by the reason of the filter
    cuts: tuple[str, ...] = ()  # shards that are cut off

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.n for shard in self.shards)

    def __str__(self) -> str:
        left_out = "".join(f"; {count:,} with only {parts} left out" for parts, count in self.skipped.items())
        left_out += "".join(f"; {count:,} left out: {reason}" for reason, count in self.left_out.items())
        shards = "1 shard" if len(self.shards) == 1 else f"{len(self.shards):,} shards"
        cuts = "".join(f"\nused up to the cut: {message}" for message in self.cuts)
        return f"{self.num_samples:,} samples in {shards}{left_out}{cuts}"


def index_shards(
    shards: Sequence[Path], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, crc: bool = False,
    rule: SampleRule | None = None, allow_truncated: bool = False, index_dir: Path | None = None,
    jobs: int | None = None, leave_if_asked: Callable[[], None] = lambda: None,
) -> IndexSummary:  # fmt: skip
    """Walk the shards, write their `.idx` files and list them in the `index.json` of their folders.

    If anything fails, the earlier index stays as it was.

    Args:
        shards: the tars to index.
        captions, crc, rule, allow_truncated, index_dir: as `IndexOptions` explains them.
        jobs: processes; None takes one per core if there are shards enough.
        leave_if_asked: called after each shard; its error ends the pass.

    Raises:
        IntegrityError: a shard is damaged, or no shard holds a pair of picture and caption.
        UserError: a shard cannot be read, its folder cannot be written, `captions` is no such choice, or the rule
            leaves nothing.
    """
    options = IndexOptions(
        captions=captions, crc=crc, rule=rule, allow_truncated=allow_truncated, index_dir=index_dir
    )  # fmt: skip
    if jobs is None:
        jobs = min(os.cpu_count() or 1, len(shards) // _JOBS_PAY_FROM + 1)
    earlier: dict[Path, ShardEntry] = {}
    for folder in {shard.parent for shard in shards}:
        listing = read_listing(folder, captions=captions, index_dir=index_dir)
        earlier.update((entry.path, entry) for entry in listing.values())
    tasks = [(shard, earlier.get(shard)) for shard in shards]
    try:
        indexed = []
        with closing(run_jobs(partial(_index_task, options=options), tasks, jobs=jobs)) as found:
            for one in found:
                indexed.append(one)
                leave_if_asked()
        return publish_index(indexed, options=options)
    finally:
        for shard in shards:
            records = idx_path(shard, captions=captions, index_dir=index_dir)
            with suppress(OSError):
                part_of(records, attempt=options.attempt).unlink()


def index_shard(path: Path, *, options: IndexOptions, earlier: ShardEntry | None = None) -> IndexedShard:
    """Walk one shard and write its records beside their place, for `publish_index`.

    Args:
        path: the tar.
        options: how to index it.
        earlier: the shard in the present index, whose checksums are kept.

    Raises:
        IntegrityError: the shard is damaged, or holds another number of pictures than `NAME_stats.json` says.
        UserError: it cannot be read, or its index cannot be written.
    """
    rows: list[tuple[int, ...]] = []
    pairs: list[TarSample] = []
    incomplete: Counter[str] = Counter()
    cuts: list[str] = []
    for sample in read_samples(path, on_cut=cuts.append if options.allow_truncated else None):
        row = _record(sample, captions=options.captions)
        if row is None:
            incomplete["+".join(sorted(sample.members))] += 1
        else:
            rows.append(row)
            if options.rule:  # kept by the thousands, they would keep the garbage collector busy
                pairs.append(sample)
    if not cuts:
        _check_stats(path, pairs=len(rows), incomplete=incomplete)
    records = np.array(rows, dtype=record_layout(options.captions))
    reasons = options.rule(path, pairs) if options.rule else [None] * len(rows)
    kept = np.array([reason is None for reason in reasons], dtype=bool)
    records = records[kept]
    _fill_crcs(path, records, crc=options.crc, earlier=earlier)
    content = records.tobytes()
    place = idx_path(path, captions=options.captions, index_dir=options.index_dir)
    write_part(place, content, attempt=options.attempt)
    entry = ShardEntry(
        path=path,
        n=len(records),
        bytes=path.stat().st_size,
        idx_sha256=hashlib.sha256(content).hexdigest(),
        captions=options.captions,
        filter_sha256=None if kept.all() else hashlib.sha256(np.packbits(kept).tobytes()).hexdigest(),
        index_dir=options.index_dir,
    )
    left_out = Counter(reason for reason in reasons if reason is not None)
    return IndexedShard(entry, incomplete, left_out, cuts[0] if cuts else None)


def publish_index(indexed: Sequence[IndexedShard], *, options: IndexOptions) -> IndexSummary:
    """Put the records of shards in their place and list the shards in their folders' `index.json`.

    Raises:
        IntegrityError: no shard holds a pair of picture and caption.
        UserError: the rule leaves nothing, or a folder cannot be written.
    """
    skipped = sum((shard.incomplete for shard in indexed), Counter[str]())
    left_out = sum((shard.left_out for shard in indexed), Counter[str]())
    entries = tuple(shard.entry for shard in indexed)
    summary = IndexSummary(
        shards=entries, skipped=dict(skipped), left_out=dict(left_out),
        cuts=tuple(shard.cut for shard in indexed if shard.cut is not None),
    )  # fmt: skip
    if not summary.num_samples:
        names = f"{entries[0].path} and {len(entries) - 1} more" if len(entries) > 1 else str(entries[0].path)
        if left_out:
            reasons = ", ".join(f"{count:,} by {reason}" for reason, count in left_out.most_common(5))
            raise UserError(f"{names}: the filter leaves no sample of {left_out.total():,}: {reasons}")
        seen = ", ".join(f"{count:,} of {parts}" for parts, count in skipped.most_common(5)) or "none at all"
        hint = "; a key ends at the first dot of the name" if any("." in parts for parts in skipped) else ""
        raise IntegrityError(
            f"{names}: no sample has both a picture ({', '.join(IMAGE_EXTENSIONS)}) and a caption "
            f"({' and '.join(options.captions)}); samples by extensions: {seen}{hint}"
        )
    by_folder: dict[Path, list[ShardEntry]] = {}
    for entry in entries:
        by_folder.setdefault(entry.path.parent, []).append(entry)
    for folder, listed in by_folder.items():
        with one_writer(index_folder(folder, index_dir=options.index_dir)):
            for entry in listed:
                publish(part_of(entry.idx_path, attempt=options.attempt), entry.idx_path)
            write_listing(folder, listed, captions=options.captions, index_dir=options.index_dir)
    return summary


def picture_of(sample: TarSample) -> str | None:
    """Return the extension of a sample's picture, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in sample.members), None)


def stated_pictures(shard: Path) -> int | None:
    """Return how many pictures img2dataset says it put into a shard (`successes` in `NAME_stats.json`), if it does.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = shard.with_name(f"{shard.stem}_stats.json")
    try:
        successes = json.loads(path.read_bytes())["successes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read as img2dataset's statistics: {error!r}") from error
    return int(successes)


def _index_task(task: tuple[Path, ShardEntry | None], *, options: IndexOptions) -> IndexedShard:
    path, earlier = task
    return index_shard(path, options=options, earlier=earlier)


def _check_stats(path: Path, *, pairs: int, incomplete: Counter[str]) -> None:
    stated = stated_pictures(path)
    extensions = set(IMAGE_EXTENSIONS)
    found = pairs + sum(count for parts, count in incomplete.items() if extensions & set(parts.split("+")))
    if stated is not None and stated != found:
        raise IntegrityError(
            f"{path} holds {found:,} pictures, but {path.stem}_stats.json counts {stated:,}: one of them is damaged or "
            "of another download"
        )


def _record(sample: TarSample, *, captions: tuple[str, ...]) -> tuple[int, ...] | None:
    extension = picture_of(sample)
    if extension is None or not sample.members.keys() >= set(captions):
        return None
    image, kind = sample.members[extension], IMAGE_EXTENSIONS.index(extension) + 1
    caption, *others = (sample.members[extension] for extension in captions)
    second = [value for member in others for value in (member.offset // BLOCK, member.size, 0, 0)]
    return image.offset // BLOCK, caption.offset // BLOCK, image.size, caption.size, 0, 0, kind, 0, 0, *second


def _fill_crcs(path: Path, records: np.ndarray, *, crc: bool, earlier: ShardEntry | None) -> None:
    """Store checksums: of all records if asked for, else those of the earlier index and, if it has any, the missing."""
    missing = np.ones(len(records), dtype=bool)
    if not crc:
        missing = ~_keep_crcs(path, records, earlier=earlier)
        if missing.all():
            return
    _read_crcs(path, records, rows=np.flatnonzero(missing))


def _keep_crcs(path: Path, records: np.ndarray, *, earlier: ShardEntry | None) -> np.ndarray:
    """Copy checksums from the earlier records of an unchanged shard, and return which records got one."""
    kept = np.zeros(len(records), dtype=bool)
    if earlier is None or earlier.bytes != path.stat().st_size or not earlier.idx_path.exists():
        return kept
    with reading(earlier.idx_path):
        content = earlier.idx_path.read_bytes()
    if hashlib.sha256(content).hexdigest() != earlier.idx_sha256:
        return kept
    old = np.frombuffer(content, dtype=records.dtype)
    old = old[(old["flags"] & HAS_CRC) > 0]
    if not len(old):
        return kept
    place = np.minimum(np.searchsorted(old["image_block"], records["image_block"]), len(old) - 1)
    same = [name for name in old.dtype.names or () if name.endswith(("_block", "_length"))]
    kept[:] = np.logical_and.reduce([old[name][place] == records[name] for name in same])
    for name in (name for name in old.dtype.names or () if name.endswith("_crc32")):
        records[name][kept] = old[name][place][kept]
    records["flags"][kept] |= HAS_CRC
    return kept


def _read_crcs(path: Path, records: np.ndarray, *, rows: np.ndarray) -> None:
    parts = [name.removesuffix("_block") for name in records.dtype.names or () if name.endswith("_block")]
    with path.open("rb") as file:
        for row in rows:
            for part in parts:
                file.seek(int(records[f"{part}_block"][row]) * BLOCK)
                records[f"{part}_crc32"][row] = zlib.crc32(file.read(int(records[f"{part}_length"][row])))
    records["flags"][rows] |= HAS_CRC
