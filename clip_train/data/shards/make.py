"""Make shards from pictures and captions, in several processes; a killed run continues where it was.

1. List the pairs of the input and shuffle them by a hash of their names. Pictures inside tables are copied out.
2. Examine each: can it be used, and is it held out? The verdicts are kept in `OUT/.making`, a file per 1,024 pairs.
3. The verdicts fix what every shard holds. Each is written, published and indexed on its own.
4. List the shards in `index.json`, remove `OUT/.making`.

Nothing depends on the number of processes or on where a killed run stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from clip_train.data.files import write_atomically
from clip_train.data.images.decode import BadSampleError
from clip_train.data.index.jobs import run_jobs
from clip_train.data.index.walk import IndexedShard, IndexOptions, index_shard, publish_index
from clip_train.data.shards.inputs.detect import read_input
from clip_train.data.shards.inputs.pair import InputOptions, Pair
from clip_train.data.shards.sample import examine, members
from clip_train.data.shards.unpack import unpacked
from clip_train.data.shards.writer import SAMPLES_PER_SHARD, ShardWriter, refuse_shards, shard_path
from clip_train.errors import IntegrityError, UserError, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_MAKING = ".making"
_CHUNK = 1024  # pairs that are examined before their verdicts are kept
_SHOWN_EXAMPLES = 3
_SIDES = ("train", "val")
_INDEX_OPTIONS = IndexOptions(crc=True, attempt="made")  # the same in all processes; the lock keeps others out


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOptions:
    """What shards are made of an input."""

    val: float = 0.0
    """Share of the pairs held out, chosen by the hash of the picture's bytes, so that copies stay on one side."""
    resize: int | None = None
    """Shorten the short side to this many pixels where it is longer; None stores the files as they are."""
    quality: int = 90
    """JPEG quality of resized photographs; other formats become PNG."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples of all shards but the last."""
    shuffle: bool = True
    """Shuffle the pairs: inputs are often sorted by class or by source."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise UserError(f"val={self.val} must lie in [0, 1)")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"resize={self.resize} must be positive")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality={self.quality} must lie in [1, 100]")
        if self.samples_per_shard < 1:
            raise UserError(f"samples_per_shard={self.samples_per_shard} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeSummary:
    """What `make_shards` wrote and what it left out."""

    kind: str  # of input
    train: int  # samples
    val: int
    shards: int
    skipped: dict[str, int]  # pairs by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # names of the first of each reason

    def __str__(self) -> str:
        left_out = "".join(
            f"\n{count:,} left out: {reason}, such as {', '.join(self.examples[reason])}"
            for reason, count in sorted(self.skipped.items())
        )
        return (
            f"{self.train:,} pairs for training and {self.val:,} held out, in {self.shards:,} shards, "
            f"from {self.kind}{left_out}"
        )


class _Shard(NamedTuple):
    """What one shard will hold: pairs, each with its place among all."""

    path: Path
    pairs: list[tuple[int, Pair]]


def make_shards(
    source: Path, out: Path, *, options: MakeOptions | None = None, input_options: InputOptions | None = None,
    jobs: int = 1, progress: Callable[[str, int, int], None] | None = None,
) -> MakeSummary:  # fmt: skip
    """Write the pairs of an input into shards below `out/train` and `out/val`.

    Args:
        source: a folder of pictures with captions, of classes or of shards, a table, or a file of COCO captions.
        out: folder for the shards. If it holds an unfinished set of the same input and options, that is continued.
        options: what to make; None takes the defaults.
        input_options: how to read the input.
        jobs: processes.
        progress: called with what is done ("unpacked", "examined", "written"), how much of it and of how much.

    Raises:
        UserError: the input is none of those, holds nothing that can be used, or `out` already holds other shards.
        IntegrityError: a picture changed under way, or a shard that is the input is damaged.
    """
    options = options or MakeOptions()
    found = read_input(source, options=input_options or InputOptions())
    listed = shuffled(found.pairs, options=options)
    with _place_of_work(out, pairs=listed, options=options) as place:
        pairs = unpacked(listed, place=place, jobs=jobs, progress=progress)
        verdicts = _examine_all(pairs, place=place, options=options, jobs=jobs, progress=progress)
        skipped = {reason: count for reason, count in sorted(Counter(verdicts).items()) if reason not in _SIDES}
        if len(pairs) == sum(skipped.values()):
            shutil.rmtree(place)
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            raise UserError(
                f"{source}: none of {len(pairs)} pictures can be used: {reasons}; the first is {listed[0].image.path}"
            )
        shards = _plan(out, pairs=pairs, verdicts=verdicts, options=options)
        indexed = []
        write = partial(_write_shard, resize=options.resize, quality=options.quality)
        for shard in run_jobs(write, shards, jobs=jobs):
            indexed.append(shard)
            if progress is not None:
                progress("written", len(indexed), len(shards))
        publish_index(indexed, options=_INDEX_OPTIONS)
    return MakeSummary(
        kind=str(found),
        train=verdicts.count("train"),
        val=verdicts.count("val"),
        shards=len(shards),
        skipped=skipped,
        examples={
            reason: [pair.name for pair, verdict in zip(pairs, verdicts, strict=True) if verdict == reason][
                :_SHOWN_EXAMPLES
            ]
            for reason in skipped
        },
    )


def shuffled(pairs: Sequence[Pair], *, options: MakeOptions) -> list[Pair]:
    """Return the pairs in the order of a hash of seed and name, or as they are without shuffling."""
    if not options.shuffle:
        return list(pairs)

    def place(pair: Pair) -> bytes:
        return hashlib.sha256(f"{options.seed}/{pair.name}".encode(errors="surrogatepass")).digest()

    return sorted(pairs, key=place)


@contextmanager
def _place_of_work(out: Path, *, pairs: Sequence[Pair], options: MakeOptions) -> Iterator[Path]:
    """Give the folder for verdicts, locked; it is removed at the end, and stays if the work was interrupted."""
    place = out / _MAKING
    listed = hashlib.sha256()
    for pair in pairs:
        listed.update(f"{pair.name}\0{pair.image}\0{pair.captions}\n".encode(errors="surrogatepass"))
    settings = {**asdict(options), "pairs": len(pairs), "pairs_sha256": listed.hexdigest()}
    with writing(out):
        for side in _SIDES if not place.exists() else ():
            refuse_shards(out / side)
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("wb")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another `shards make` is writing there") from error
        _check_settings(place / "settings.json", settings=settings)
        yield place
        shutil.rmtree(place)


def _check_settings(path: Path, *, settings: dict[str, object]) -> None:
    if not path.exists():
        write_atomically(path, json.dumps(settings).encode())
        return
    earlier = json.loads(path.read_bytes())
    changed = [
        f"{name} {earlier.get(name)} -> {value}" for name, value in settings.items() if earlier.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{path.parent.parent} holds an unfinished set of shards of other input or options ({', '.join(changed)}): "
            "finish it with those, or remove it"
        )


def _examine_all(
    pairs: Sequence[Pair], *, place: Path, options: MakeOptions, jobs: int,
    progress: Callable[[str, int, int], None] | None,
) -> list[str]:  # fmt: skip
    """Return for each pair its side, or the reason why it cannot be used."""
    tasks = [
        (place / f"examined-{start:010d}.json", pairs[start : start + _CHUNK]) for start in range(0, len(pairs), _CHUNK)
    ]
    verdicts: list[str] = []
    for chunk in run_jobs(partial(_examine_chunk, val=options.val), tasks, jobs=jobs):
        verdicts += chunk
        if progress is not None:
            progress("examined", len(verdicts), len(pairs))
    return verdicts


def _examine_chunk(task: tuple[Path, Sequence[Pair]], *, val: float) -> list[str]:
    path, pairs = task
    if path.exists():
        kept: list[str] = json.loads(path.read_bytes())
        return kept
    verdicts = []
    for pair in pairs:
        try:
            verdicts.append("val" if examine(pair) < val else "train")
        except BadSampleError as error:
            verdicts.append(error.reason)
    write_atomically(path, json.dumps(verdicts).encode())
    return verdicts


def _plan(out: Path, *, pairs: Sequence[Pair], verdicts: Sequence[str], options: MakeOptions) -> list[_Shard]:
    shards = []
    for side in _SIDES:
        chosen = [
            (number, pair)
            for number, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True))
            if verdict == side
        ]
        size = options.samples_per_shard
        for number, start in enumerate(range(0, len(chosen), size)):
            shards.append(_Shard(shard_path(out / side, number), chosen[start : start + size]))
    return shards


def _write_shard(shard: _Shard, *, resize: int | None, quality: int) -> IndexedShard:
    """Write, publish and index a shard, unless an earlier attempt already published it."""
    if not shard.path.exists():
        try:
            shard.path.parent.mkdir(parents=True, exist_ok=True)
            with ShardWriter(shard.path) as writer:
                for number, pair in shard.pairs:
                    writer.write(sample_key(pair, number=number), members(pair, resize=resize, quality=quality))
        except BadSampleError as error:
            raise IntegrityError(f"{pair.image.path} changed while shards were made: {error.reason}") from error
        except OSError as error:
            raise UserError(f"{shard.path} cannot be written: {error.strerror or error}") from error
    return index_shard(shard.path, options=_INDEX_OPTIONS)


def sample_key(pair: Pair, *, number: int) -> str:
    """Return the key of a pair's sample: its place among all, and what of its name is safe in any file system."""
    return f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', PurePosixPath(pair.name).stem)[:60]}"
