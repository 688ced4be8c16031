"""Find the pictures of evaluation sets among those of training shards: the same bytes, or the same to the eye."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_train.data.files import write_atomically
from clip_train.data.images.decode import BadSampleError, decode_image
from clip_train.data.images.folder import files_below, is_picture
from clip_train.data.images.perceptual_hash import NUM_BITS, THUMBNAIL_SIDE, distances, fingerprint, likeness
from clip_train.data.index.jobs import run_jobs
from clip_train.data.remote.config import cache_in
from clip_train.data.sequential import FileImages, ImageSource, ShardImages
from clip_train.data.shard_file import ShardFile, find_files
from clip_train.errors import UserError

# Chosen by scripts/measure_overlap.py: more bits find hardly more copies, and more pictures of something else.
MAX_DISTANCE = 8  # bits of 64
MIN_LIKENESS = 0.95
_PICTURES_PER_TASK = 512
_PICTURES_PER_PRODUCT = 64
_ROWS_PER_PRODUCT = 65536


class Match(NamedTuple):
    """A picture of an evaluation set and the picture of the training shards that is most like it."""

    picture: int  # of the evaluation set
    key: str  # of the training picture, SHARD/KEY
    exact: bool  # the same bytes
    mirrored: bool  # left and right exchanged
    distance: int  # bits of the hashes that differ
    likeness: float  # correlation of the thumbnails

    @property
    def order(self) -> tuple[bool, float, int, str]:
        """Sort from the nearest on, in the same way whatever came first."""
        return not self.exact, -self.likeness, self.distance, self.key


@dataclass(slots=True, kw_only=True)
class Overlap:
    """What an evaluation set has in common with the training shards."""

    name: str
    keys: list[str]
    """N names of its pictures."""
    uncompared: int = 0
    """Pictures that cannot be decoded or have a single colour: only their bytes were compared."""
    matches: dict[int, Match] = field(default_factory=dict)
    """The nearest training picture by picture of the set."""
    counts: dict[int, int] = field(default_factory=dict)
    """Training pictures found by picture of the set."""

    def line(self) -> str:
        """Return the result for a person."""
        exact = sum(match.exact for match in self.matches.values())
        mirrored = sum(match.mirrored for match in self.matches.values())
        found = len(self.matches)
        rest = f"; {self.uncompared:,} could be compared by their bytes only" if self.uncompared else ""
        return (
            f"{self.name}: {found:,} of {len(self.keys):,} pictures ({found / len(self.keys):.2%}) are in the training "
            f"shards: {exact:,} the same file, {found - exact:,} alike to the eye, {mirrored:,} of them mirrored{rest}"
        )


def find_overlap(
    shards: str | Sequence[str],
    sets: Sequence[Path],
    *,
    max_distance: int = MAX_DISTANCE,
    min_likeness: float = MIN_LIKENESS,
    jobs: int = 1,
    cache_dir: Path | None = None,
) -> list[Overlap]:
    """Compare every picture of the training shards with every one of the sets.

    Two pictures are alike if at most `max_distance` bits of their hashes differ and their thumbnails correlate with at
    least `min_likeness`, as they are or mirrored. Memory grows with the sets alone, some 1 kB a picture.

    Args:
        shards: as for `data.train`.
        sets: folders of pictures or of .tar files, at any depth.
        max_distance: of 64 bits.
        min_likeness: up to 1.
        jobs: processes.
        cache_dir: where remote shards lie while they are read; None takes the default of `data.cache.dir`.

    Raises:
        UserError: a set or a shard is not there.
        IntegrityError: a shard is damaged.
    """
    if not 0 <= max_distance < NUM_BITS // 2 or not 0 < min_likeness <= 1:
        raise UserError(f"--distance={max_distance} must lie in [0, 31] and --likeness={min_likeness} in (0, 1]")
    files = find_files(shards, field="shards", cache=cache_in(cache_dir))
    sources = [_open_set(folder) for folder in sets]
    overlaps = [
        Overlap(name=str(folder), keys=[source.key(i) for i in range(len(source))])
        for folder, source in zip(sets, sources, strict=True)
    ]
    tasks = [
        _Piece(source, slice(start, start + _PICTURES_PER_TASK), mirrored=True)
        for source in sources
        for start in range(0, len(source), _PICTURES_PER_TASK)
    ]
    with tempfile.TemporaryDirectory() as folder:
        # Processes map the file: it is in memory once, not once for each.
        known = Path(folder) / "fingerprints.npy"
        rows = np.concatenate(list(run_jobs(_fingerprint_piece, tasks, jobs=jobs)))
        np.save(known, rows)
        starts = np.cumsum([0, *(len(source) for source in sources)])
        for overlap, first, last in zip(overlaps, starts[:-1], starts[1:], strict=True):
            overlap.uncompared = int((~rows["known"][first:last]).sum())
        search = _Search(known, max_distance=max_distance, min_likeness=min_likeness)
        for found in run_jobs(search, files, jobs=jobs):
            for match, count in found:
                number = int(np.searchsorted(starts, match.picture, side="right")) - 1
                _add(overlaps[number], match._replace(picture=match.picture - int(starts[number])), count)
    return overlaps


def write_matches(overlaps: Sequence[Overlap], path: Path) -> None:
    """Write one line per picture of a set that was found, as CSV.

    Raises:
        UserError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["set", "picture", "training_picture", "found", "exact", "mirrored", "distance", "likeness"])
    for overlap in overlaps:
        for picture, match in sorted(overlap.matches.items()):
            writer.writerow(
                [overlap.name, overlap.keys[picture], match.key, overlap.counts[picture], int(match.exact),
                 int(match.mirrored), match.distance, f"{match.likeness:.4f}"]
            )  # fmt: skip
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


class _Piece(NamedTuple):
    """Some pictures of a source."""

    source: ImageSource
    places: slice
    mirrored: bool  # whether what they look like mirrored is wanted too


_ROW = np.dtype(
    [
        ("digest", np.uint64), ("known", np.bool_), ("bits", np.int8, (2, NUM_BITS)),
        ("thumbnail", np.uint8, (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)),
    ]
)  # fmt: skip
"""A picture: hash of its bytes; whether the rest is known; bits as it is and mirrored; thumbnail as it is."""


def _fingerprint_piece(piece: _Piece) -> np.ndarray:
    """Return a row for each picture."""
    places = range(len(piece.source))[piece.places]
    rows = np.zeros(len(places), dtype=_ROW)
    for row, place in zip(rows, places, strict=True):
        content = piece.source.read(place)
        row["digest"] = _digest(content)
        try:
            pixels = decode_image(content)
        except BadSampleError:
            continue
        sides = [pixels, np.ascontiguousarray(pixels[:, ::-1])] if piece.mirrored else [pixels]
        for side, seen in enumerate(sides):
            if (found := fingerprint(seen)) is not None:
                row["bits"][side], row["known"] = found.bits, True
                if side == 0:
                    row["thumbnail"] = found.thumbnail
    return rows


@dataclass(frozen=True, slots=True)
class _Search:
    """Searches the pictures of one shard."""

    known: Path
    max_distance: int
    min_likeness: float

    def __call__(self, shard: ShardFile) -> list[tuple[Match, int]]:
        """Return the nearest picture of the shard, and how many there are, for each picture of a set that is found."""
        source = ShardImages([shard])
        nearest: dict[int, Match] = {}
        counts: dict[int, int] = {}
        for start in range(0, len(source), _PICTURES_PER_PRODUCT):
            piece = _Piece(source, slice(start, start + _PICTURES_PER_PRODUCT), mirrored=False)
            for match in self._matches(piece):
                counts[match.picture] = counts.get(match.picture, 0) + 1
                if match.picture not in nearest or match.order < nearest[match.picture].order:
                    nearest[match.picture] = match
        return [(match, counts[picture]) for picture, match in nearest.items()]

    def _matches(self, piece: _Piece) -> Iterator[Match]:
        """Yield each picture of a set with each of these pictures that is like it, once."""
        rows = _fingerprint_piece(piece)
        known = _load(self.known)
        places = range(len(piece.source))[piece.places]
        for first in range(0, len(known), _ROWS_PER_PRODUCT):
            sets = known[first : first + _ROWS_PER_PRODUCT]
            same = rows["digest"][:, None] == sets["digest"][None]  # [n, m]
            both = rows["known"][:, None] & sets["known"][None]
            # One of a training picture against both of a set's: the nearer counts.
            apart = np.stack([distances(rows["bits"][:, 0], sets["bits"][:, side]) for side in (0, 1)])  # [2, n, m]
            for ours, theirs in np.argwhere(same | (both & (apart.min(axis=0) <= self.max_distance))):
                key = piece.source.key(places[ours])
                match = self._judge(rows[ours], sets[theirs], apart[:, ours, theirs], exact=bool(same[ours, theirs]))
                if match is not None:
                    yield match._replace(picture=first + int(theirs), key=key)

    def _judge(self, ours: np.void, theirs: np.void, apart: np.ndarray, *, exact: bool) -> Match | None:
        if exact:
            return Match(0, "", exact=True, mirrored=False, distance=0, likeness=1.0)
        thumbnail = theirs["thumbnail"]
        for side, seen in enumerate((thumbnail, thumbnail[:, ::-1])):  # mirrored only if it is not alike as it is
            alike = float(likeness(ours["thumbnail"][None], seen[None])[0])
            if apart[side] <= self.max_distance and alike >= self.min_likeness:
                return Match(0, "", exact=False, mirrored=side == 1, distance=int(apart[side]), likeness=alike)
        return None


@functools.cache
def _load(path: Path) -> np.ndarray:
    rows: np.ndarray = np.load(path, mmap_mode="r")
    return rows


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _add(overlap: Overlap, match: Match, count: int) -> None:
    overlap.counts[match.picture] = overlap.counts.get(match.picture, 0) + count
    former = overlap.matches.get(match.picture)
    if former is None or match.order < former.order:
        overlap.matches[match.picture] = match


def _open_set(folder: Path) -> ImageSource:
    """Open every picture below a folder, those in shards if there are any."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures or of .tar files")
    files = sorted(files_below(folder))
    if shards := [path for path in files if path.suffix == ".tar"]:
        return ShardImages(shards)
    if not (pictures := list(filter(is_picture, files))):
        raise UserError(f"{folder} holds neither pictures nor .tar files")
    return FileImages(pictures, folder=folder)
