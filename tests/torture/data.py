"""Damaged shards and pictures, the order of samples, bad samples through kills: the tests of tests/data, at length."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.data.test_bad import bad_shards, check_substitutes, undisturbed
from tests.data.test_cold_start import (
    test_a_resume_at_two_thousand_million_samples_opens_only_the_shards_of_its_first_batch as check_cold_start,
)
from tests.data.test_fuzz import fuzz_pictures, fuzz_tar
from tests.data.test_order import check_exactly_once
from tests.data.test_order import (
    test_neighbours_in_a_shard_seldom_meet_in_a_batch_and_almost_never_twice as check_neighbours,
)
from tests.torture.row import Outcome, Row, each

RANKS_AND_WORKERS = [(size, workers) for size in (1, 2, 4) for workers in (0, 2)]


def damaged_tar(seed: int) -> None:
    """Read one damaged shard."""
    with tempfile.TemporaryDirectory() as folder:
        fuzz_tar(Path(folder), seed)


def damaged_pictures(start: int, count: int, seed: int) -> Iterator[Outcome]:
    """Decode damaged pictures, some hundreds in one process; a process that dies counts against all of them."""
    first = seed + start
    while count > 0:
        seeds = range(0)
        try:
            for seeds, _ in fuzz_pictures(first, count):
                yield from (Outcome(s) for s in seeds)
                first, count = seeds.stop, count - len(seeds)
        except Exception as error:
            yield Outcome(first, f"{type(error).__name__}: {error}, among the pictures from {first}")
            first, count = first + 1, count - 1


def cold_start(seed: int) -> None:
    """Take the first batch after a resume at 1.2 thousand million samples; it is the same one each time."""
    del seed
    with tempfile.TemporaryDirectory() as folder:
        check_cold_start(Path(folder))


def bad_samples(seed: int) -> None:
    """Go over bad samples with some number of ranks and workers, through a kill."""
    size, workers = RANKS_AND_WORKERS[seed % len(RANKS_AND_WORKERS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = bad_shards(folder / "shards")
        alone = undisturbed(shards, folder / "alone")
        check_substitutes(shards, alone, folder / "run", size=size, workers=workers)


ROWS = [
    Row(
        number=3,
        text="resume position at 2 G samples: in a second, no other shard opened",
        nightly=1,
        run=each(cold_start),
    ),
    Row(
        number=4,
        text="each sample once per epoch: random layouts, 3 epochs each",
        nightly=1000,
        run=each(check_exactly_once),
    ),
    Row(
        number=5,
        text="shuffle of 400 x 5,000: neighbours in a batch",
        nightly=1,
        run=each(lambda seed: check_neighbours()),
    ),
    Row(number=6, text="damaged tars: refused, or every sample read or counted", nightly=10_000, run=each(damaged_tar)),
    Row(
        number=7, text="damaged pictures, 12 formats: decoded or refused in time", nightly=20_000, run=damaged_pictures
    ),
    Row(
        number=8,
        text="5 % bad samples, 1, 2, 4 ranks, 0, 2 workers, a kill between: same substitutes and counts",
        nightly=12,
        run=each(bad_samples),
    ),
]
