"""The index of shards: how many samples each holds and where their bytes lie.

Beside each shard `NAME.tar` stands `NAME.idx`, 32 bytes per sample, and in each folder one `index.json` that lists its
shards. Only pairs of a picture and a caption are samples; anything incomplete is counted and never gets a place in the
order. What a filter leaves out has no record either. File times are no part of an index, since they change on copy;
sizes and hashes are.

Which members hold captions (`.txt`, `.json` or both) decides what a sample is. Every choice has files of its own, so
that runs with different captions share a folder: `NAME.idx` and `index.json` for `.txt`, `NAME.json.idx` and
`index-json.json` for `.json`, `NAME.txt+json.idx` and `index-txt+json.json` for both.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.data.files import write_atomically
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
CAPTION_CHOICES = (DEFAULT_CAPTIONS, ("json",), CAPTION_EXTENSIONS)
# In order of preference, should a sample have several. The position + 1 is the kind stored in the index.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard as its index describes it."""

    path: Path
    n: int  # samples
    bytes: int  # size of the tar
    idx_sha256: str
    captions: tuple[str, ...] = DEFAULT_CAPTIONS  # extensions of the members that hold them
    filter_sha256: str | None = None  # of one bit per pair, whether it was kept; None if nothing was filtered
    index_dir: Path | None = None  # as for `index_folder`

    @property
    def location(self) -> str:
        """What messages call the shard, and what its name in a fingerprint comes from."""
        return str(self.path)

    @property
    def idx_path(self) -> Path:
        """Where the sample records of the shard are."""
        return idx_path(self.path, captions=self.captions, index_dir=self.index_dir)

    @property
    def record(self) -> np.dtype:
        """Layout of a sample's record."""
        return record_layout(self.captions)


def index_folder(folder: Path, *, index_dir: Path | None) -> Path:
    """Return where the index of a folder's shards is: in the folder, or at its full path below `index_dir`."""
    return folder if index_dir is None else index_dir / folder.relative_to(folder.anchor)


def idx_path(shard: Path, *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, index_dir: Path | None = None) -> Path:
    """Return where the sample records of a shard are kept."""
    suffix = ".idx" if captions == DEFAULT_CAPTIONS else f".{'+'.join(captions)}.idx"
    return index_folder(shard.parent, index_dir=index_dir) / shard.with_suffix(suffix).name


def listing_path(folder: Path, *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, index_dir: Path | None = None) -> Path:
    """Return where the shards of a folder are listed."""
    name = INDEX_NAME if captions == DEFAULT_CAPTIONS else f"index-{'+'.join(captions)}.json"
    return index_folder(folder, index_dir=index_dir) / name


def record_layout(captions: tuple[str, ...]) -> np.dtype:
    """Return the layout of records for one caption member or for both."""
    return RECORD if len(captions) == 1 else RECORD_WITH_JSON


def load_index(
    shards: Sequence[Path], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, index_dir: Path | None = None
) -> tuple[list[ShardEntry], list[Path]]:
    """Return the entries of the shards that have an index, in the given order, and the shards that have none.

    Raises:
        IntegrityError: an index is damaged or of another version, or a shard or its `.idx` changed after indexing.
        UserError: a shard without index for these captions is filtered in the index for others.
    """
    listings: dict[Path, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    missing: list[Path] = []
    for shard in shards:
        listing = listings.get(shard.parent)
        if listing is None:
            listing = listings[shard.parent] = read_listing(shard.parent, captions=captions, index_dir=index_dir)
        entry = listing.get(shard.name)
        if entry is None or not entry.idx_path.exists():
            missing.append(shard)
            continue
        check_sizes(entry)
        entries.append(entry)
    _refuse_unfiltered(missing, captions=captions, index_dir=index_dir)
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


def fingerprint(named_shards: Iterable[tuple[str, ShardEntry]], *, captions: tuple[str, ...] = DEFAULT_CAPTIONS) -> str:
    """Return the sha256 that identifies a list of shards by names, sample counts, sizes, filters, caption members."""
    lines = ""
    for name, shard in named_shards:
        filtered = f"\t{shard.filter_sha256}" if shard.filter_sha256 else ""
        lines += f"{name}\t{shard.n}\t{shard.bytes}{filtered}\n"
    if captions != DEFAULT_CAPTIONS:
        lines += f"captions\t{'+'.join(captions)}\n"
    # The names of files may hold bytes that are no UTF-8.
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def write_listing(
    folder: Path, entries: Sequence[ShardEntry], *, captions: tuple[str, ...], index_dir: Path | None
) -> None:
    """List the entries in the folder's index, beside shards that were indexed earlier and still exist."""
    earlier = read_listing(folder, captions=captions, index_dir=index_dir)
    listed = {name: entry for name, entry in earlier.items() if entry.path.exists()}
    listed.update((entry.path.name, entry) for entry in entries)
    shards = [listed[name] for name in sorted(listed, key=os.fsencode)]
    document = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "captions": "+".join(captions),
        "shards": [
            {"name": s.path.name, "n": s.n, "bytes": s.bytes, "idx_sha256": s.idx_sha256}
            | ({"filter_sha256": s.filter_sha256} if s.filter_sha256 else {})
            for s in shards
        ],
        "N": sum(s.n for s in shards),
        "fingerprint": fingerprint(((s.path.name, s) for s in shards), captions=captions),
    }
    path = listing_path(folder, captions=captions, index_dir=index_dir)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def read_listing(
    folder: Path, *, captions: tuple[str, ...] = DEFAULT_CAPTIONS, index_dir: Path | None = None
) -> dict[str, ShardEntry]:
    """Return the entries of a folder's index by the names of the shards; none if there is no index.

    Raises:
        IntegrityError: the index is damaged or of another version.
        UserError: it may not be read.
    """
    path = listing_path(folder, captions=captions, index_dir=index_dir)
    advice = f"remove it, then {_how_to_index(folder)}"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}): {advice}") from error
    return {
        row["name"]: ShardEntry(
            path=folder / row["name"],
            n=row["n"],
            bytes=row["bytes"],
            idx_sha256=row["idx_sha256"],
            captions=captions,
            filter_sha256=row.get("filter_sha256"),
            index_dir=index_dir,
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
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin} cannot be read ({error}): {advice}") from error
    try:
        if (document["format"], document["version"]) != (INDEX_FORMAT, INDEX_VERSION):
            raise IntegrityError(
                f"{origin} is {document['format']} version {document['version']}, not {INDEX_FORMAT} version "
                f"{INDEX_VERSION}: {advice}"
            )
        rows = document["shards"]
        types = {"name": str, "n": int, "bytes": int, "idx_sha256": str}
        if not all(type(row[key]) is kind for row in rows for key, kind in types.items()):
            raise TypeError("a row has values of other types")
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{origin} is damaged: {advice}") from error
    return rows


def _how_to_index(folder: Path) -> str:
    return f"run `clip-train shards index {folder}`"


def _refuse_unfiltered(shards: Sequence[Path], *, captions: tuple[str, ...], index_dir: Path | None) -> None:
    """Shards that are filtered for other captions must not come back whole without being asked for."""
    for other in CAPTION_CHOICES:
        for folder in {shard.parent for shard in shards} if other != captions else ():
            listing = read_listing(folder, captions=other, index_dir=index_dir)
            if any(s.name in listing and listing[s.name].filter_sha256 for s in shards if s.parent == folder):
                raise UserError(
                    f"{folder} is filtered for captions from {'+'.join(other)}, but not yet indexed for captions from "
                    f"{'+'.join(captions)}: {_how_to_index(folder)} with --captions {'+'.join(captions)} and the filter"
                )
