"""The index of shards: how many samples each holds and where their bytes lie.

Beside each shard `NAME.tar` stands `NAME.idx`, 32 bytes per sample, and in each folder one `index.json` that lists its
shards. Only pairs of a picture and a caption are samples; anything incomplete is counted and never gets a place in the
order. File times are no part of an index, since they change on copy; sizes and hashes are.

Which members hold captions (`.txt`, `.json` or both) decides what a sample is. Every choice has files of its own, so
that runs with different captions share a folder: `NAME.idx` and `index.json` for `.txt`, `NAME.json.idx` and
`index-json.json` for `.json`, `NAME.txt+json.idx` and `index-txt+json.json` for both.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.data.tar import BLOCK, TarSample, read_samples
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

INDEX_FORMAT = "clip-train-index"
INDEX_VERSION = 1
INDEX_NAME = "index.json"
# What may hold captions, in the order in which an index and a reader hold them.
CAPTION_EXTENSIONS = ("txt", "json")
DEFAULT_CAPTIONS = ("txt",)
_CAPTION_CHOICES = (DEFAULT_CAPTIONS, ("json",), CAPTION_EXTENSIONS)
# In order of preference, should a sample have several. The position + 1 is the kind stored in the index.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
HAS_CRC = 1
_FIELDS = [
    ("image_block", "<u4"),  # content offsets in blocks of 512 bytes
    ("caption_block", "<u4"),
    ("image_length", "<u4"),  # bytes
    ("caption_length", "<u4"),
    ("image_crc32", "<u4"),  # valid if flags has HAS_CRC
    ("caption_crc32", "<u4"),
    ("image_kind", "<u2"),
    ("flags", "<u2"),
    ("zero", "<u4"),
]
RECORD = np.dtype(_FIELDS)
# With both caption members: the first is `caption_*`, the second `json_*`.
RECORD_WITH_JSON = np.dtype(
    [*_FIELDS, ("json_block", "<u4"), ("json_length", "<u4"), ("json_crc32", "<u4"), ("zero2", "<u4")]
)
_JOBS_PAY_FROM = 8  # shards; below that, starting processes costs more than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard as its index describes it."""

    path: Path
    n: int  # samples
    bytes: int  # size of the tar
    idx_sha256: str
    captions: tuple[str, ...] = DEFAULT_CAPTIONS  # extensions of the members that hold them

    @property
    def location(self) -> str:
        """What messages call the shard, and what its name in a fingerprint comes from."""
        return str(self.path)

    @property
    def idx_path(self) -> Path:
        """Where the sample records of the shard are."""
        return idx_path(self.path, captions=self.captions)

    @property
    def record(self) -> np.dtype:
        """Layout of a sample's record."""
        return record_layout(self.captions)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSummary:
    """What an index pass found."""

    shards: tuple[ShardEntry, ...]
    skipped: dict[str, int]  # incomplete samples by what they consist of, such as "jpg" or "cls+jpg"

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.n for shard in self.shards)

    def __str__(self) -> str:
        left_out = "".join(f"; {count:,} with only {parts} left out" for parts, count in self.skipped.items())
        shards = "1 shard" if len(self.shards) == 1 else f"{len(self.shards):,} shards"
        return f"{self.num_samples:,} samples in {shards}{left_out}"


def idx_path(shard: Path, *, captions: tuple[str, ...] = DEFAULT_CAPTIONS) -> Path:
    """Return where the sample records of a shard are kept."""
    return shard.with_suffix(".idx" if captions == DEFAULT_CAPTIONS else f".{'+'.join(captions)}.idx")


def listing_path(folder: Path, *, captions: tuple[str, ...] = DEFAULT_CAPTIONS) -> Path:
    """Return where the shards of a folder are listed."""
    return folder / (INDEX_NAME if captions == DEFAULT_CAPTIONS else f"index-{'+'.join(captions)}.json")


def record_layout(captions: tuple[str, ...]) -> np.dtype:
    """Return the layout of records for one caption member or for both."""
    return RECORD if len(captions) == 1 else RECORD_WITH_JSON


def index_shards(
    shards: Sequence[Path], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, crc: bool = False, jobs: int | None = None
) -> IndexSummary:
    """Walk the shards, write their `.idx` files and list them in the `index.json` of their folders.

    Args:
        shards: the tars to index.
        captions: extensions of the members that hold captions; a sample has all of them.
        crc: also read every sample and store its crc32.
        jobs: processes; None takes one per core if there are shards enough.

    Raises:
        IntegrityError: a shard is damaged, or no shard holds a pair of picture and caption.
        UserError: a shard cannot be read, its folder cannot be written, or `captions` is no such choice.
    """
    if captions not in _CAPTION_CHOICES:
        choices = ", ".join("+".join(choice) for choice in _CAPTION_CHOICES)
        raise UserError(f"captions={'+'.join(captions)} must be one of {choices}")
    if jobs is None:
        jobs = min(os.cpu_count() or 1, len(shards) // _JOBS_PAY_FROM + 1)
    index_one = partial(index_shard, captions=captions, crc=crc)
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(index_one, shards))
    else:
        results = [index_one(shard) for shard in shards]
    skipped = sum((missing for _, missing in results), Counter[str]())
    summary = IndexSummary(shards=tuple(entry for entry, _ in results), skipped=dict(skipped))
    if not summary.num_samples:
        seen = ", ".join(f"{count:,} of {parts}" for parts, count in skipped.most_common(5)) or "none at all"
        raise IntegrityError(
            f"{_few(shards)}: no sample has both a picture ({', '.join(IMAGE_EXTENSIONS)}) and a caption "
            f"({' and '.join(captions)}); samples by extensions: {seen}"
        )
    by_folder: dict[Path, list[ShardEntry]] = {}
    for entry in summary.shards:
        by_folder.setdefault(entry.path.parent, []).append(entry)
    for folder, entries in by_folder.items():
        _write_listing(folder, entries, captions=captions)
    return summary


def load_index(
    shards: Sequence[Path], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS
) -> tuple[list[ShardEntry], list[Path]]:
    """Return the entries of the shards that have an index, in the given order, and the shards that have none.

    Raises:
        IntegrityError: an index is damaged or of another version, or a shard or its `.idx` changed after indexing.
    """
    listings: dict[Path, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    missing: list[Path] = []
    for shard in shards:
        listing = listings.get(shard.parent)
        if listing is None:
            listing = listings[shard.parent] = _read_listing(shard.parent, captions=captions)
        entry = listing.get(shard.name)
        if entry is None or not entry.idx_path.exists():
            missing.append(shard)
            continue
        check_sizes(entry)
        entries.append(entry)
    return entries, missing


def check_sizes(entry: ShardEntry) -> None:
    """Check a shard and its records against the sizes in the index.

    Raises:
        IntegrityError: a file changed after indexing, or cannot be looked at.
    """
    try:
        size, idx_size = entry.path.stat().st_size, entry.idx_path.stat().st_size
    except OSError as error:
        raise IntegrityError(f"{entry.path} or its index: {error.strerror or error}") from error
    if size != entry.bytes:
        raise IntegrityError(
            f"{entry.path} changed after indexing: size {entry.bytes} -> {size} bytes; if that is meant, "
            f"{_how_to_index(entry.path.parent)}"
        )
    if idx_size != entry.n * entry.record.itemsize:
        raise IntegrityError(
            f"{entry.idx_path} has {idx_size} bytes, not {entry.record.itemsize} for each of {entry.n} samples: "
            f"{_how_to_index(entry.path.parent)}"
        )


def fingerprint(
    names_counts_sizes: Iterable[tuple[str, int, int]], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS
) -> str:
    """Return the sha256 that identifies a list of shards by names, sample counts, sizes and caption members."""
    lines = "".join(f"{name}\t{n}\t{size}\n" for name, n, size in names_counts_sizes)
    if captions != DEFAULT_CAPTIONS:
        lines += f"captions\t{'+'.join(captions)}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, also after a crash.

    Raises:
        UserError: the folder cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): shards need their index beside them; "
            "index them where the folder is writable"
        ) from error


def index_shard(path: Path, *, captions: tuple[str, ...], crc: bool) -> tuple[ShardEntry, Counter[str]]:
    """Walk one shard and write its records; return its entry and its incomplete samples by what they consist of.

    Raises:
        IntegrityError: the shard is damaged.
        UserError: it cannot be read, or its folder cannot be written.
    """
    rows: list[tuple[int, ...]] = []
    incomplete: Counter[str] = Counter()
    for sample in read_samples(path):
        row = _record(sample, captions=captions)
        if row is None:
            incomplete["+".join(sorted(sample.members))] += 1
        else:
            rows.append(row)
    records = np.array(rows, dtype=record_layout(captions))
    if crc:
        _add_crcs(path, records)
    content = records.tobytes()
    write_atomically(idx_path(path, captions=captions), content)
    entry = ShardEntry(
        path=path, n=len(records), bytes=path.stat().st_size, idx_sha256=hashlib.sha256(content).hexdigest(),
        captions=captions,
    )  # fmt: skip
    return entry, incomplete


def _record(sample: TarSample, *, captions: tuple[str, ...]) -> tuple[int, ...] | None:
    if not sample.members.keys() >= set(captions):
        return None
    caption, *others = (sample.members[extension] for extension in captions)
    second = [value for member in others for value in (member.offset // BLOCK, member.size, 0, 0)]
    for kind, extension in enumerate(IMAGE_EXTENSIONS, start=1):
        image = sample.members.get(extension)
        if image is not None:
            first = image.offset // BLOCK, caption.offset // BLOCK, image.size, caption.size, 0, 0, kind, 0, 0
            return *first, *second
    return None


def _add_crcs(path: Path, records: np.ndarray) -> None:
    parts = [name.removesuffix("_block") for name in records.dtype.names or () if name.endswith("_block")]
    with path.open("rb") as file:
        for record in records:
            for part in parts:
                file.seek(int(record[f"{part}_block"]) * BLOCK)
                record[f"{part}_crc32"] = zlib.crc32(file.read(int(record[f"{part}_length"])))
    records["flags"] |= HAS_CRC


def _write_listing(folder: Path, entries: list[ShardEntry], *, captions: tuple[str, ...]) -> None:
    """List the entries in the folder's index, beside shards that were indexed earlier and still exist."""
    listed = {name: entry for name, entry in _read_listing(folder, captions=captions).items() if entry.path.exists()}
    listed.update((entry.path.name, entry) for entry in entries)
    shards = [listed[name] for name in sorted(listed, key=os.fsencode)]
    document = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "captions": "+".join(captions),
        "shards": [{"name": s.path.name, "n": s.n, "bytes": s.bytes, "idx_sha256": s.idx_sha256} for s in shards],
        "N": sum(s.n for s in shards),
        "fingerprint": fingerprint(((s.path.name, s.n, s.bytes) for s in shards), captions=captions),
    }
    write_atomically(listing_path(folder, captions=captions), (json.dumps(document, indent=1) + "\n").encode())


def _read_listing(folder: Path, *, captions: tuple[str, ...]) -> dict[str, ShardEntry]:
    path = listing_path(folder, captions=captions)
    advice = f"remove it, then {_how_to_index(folder)}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}): {advice}") from error
    return {
        row["name"]: ShardEntry(
            path=folder / row["name"], n=row["n"], bytes=row["bytes"], idx_sha256=row["idx_sha256"], captions=captions
        )
        for row in parse_listing(content, origin=str(path), advice=advice)
    }


def parse_listing(content: bytes, *, origin: str, advice: str) -> list[dict[str, Any]]:
    """Return the rows of an `index.json`, each with `name`, `n`, `bytes` and `idx_sha256`.

    Args:
        content: of the file.
        origin: what to call it in messages.
        advice: what to do if it is damaged.

    Raises:
        IntegrityError: it is damaged or of another version.
    """
    try:
        document: Any = json.loads(content)
    except ValueError as error:
        raise IntegrityError(f"{origin} cannot be read ({error}): {advice}") from error
    try:
        if (document["format"], document["version"]) != (INDEX_FORMAT, INDEX_VERSION):
            raise IntegrityError(
                f"{origin} is {document['format']} version {document['version']}, not {INDEX_FORMAT} version "
                f"{INDEX_VERSION}: {advice}"
            )
        rows = document["shards"]
        if not all(row.keys() >= {"name", "n", "bytes", "idx_sha256"} for row in rows):
            raise KeyError("name, n, bytes, idx_sha256")
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{origin} is damaged: {advice}") from error
    return rows


def _how_to_index(folder: Path) -> str:
    return f"run `clip-train shards index {folder}`"


def _few(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
