"""Whole runs through kills and through changes of processes and workers."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.test_kills import check_kills, random_kills
from tests.test_worlds import PAIRS, check_change_of_world, check_changes_of_workers
from tests.torture.row import Row, each

KILLS = 5  # of one run
STEPS = 80


def kills(seed: int) -> None:
    """Kill five things in one run."""
    with TemporaryDirectory() as name:
        check_kills(Path(name), random_kills(random.Random(seed), count=KILLS), steps=STEPS, seed=seed)


def worlds(seed: int) -> None:
    """Go from one number of processes to another."""
    first, second = PAIRS[seed % len(PAIRS)]
    with TemporaryDirectory() as name:
        check_change_of_world(Path(name), first, second, rng=random.Random(seed))


def workers(seed: int) -> None:
    """Train with 0, 1, 2, 3 and 5 workers in some order."""
    with TemporaryDirectory() as name:
        check_changes_of_workers(Path(name), steps=STEPS, rng=random.Random(seed))


ROWS = [
    Row(
        number=1,
        text="runs with 5 random SIGKILLs each of a rank, worker, launcher or save: same samples and weights",
        nightly=60,
        run=each(kills),
    ),
    Row(
        number=2,
        part="a",
        text="changes among 1, 2, 3, 4, 6, 8 processes: same batches, losses of 200 steps within 1e-5",
        nightly=len(PAIRS),
        run=each(worlds),
    ),
    Row(
        number=2,
        part="b",
        text="runs through 0, 1, 2, 3, 5 workers in random order: weights equal to the bit",
        nightly=12,
        run=each(workers),
    ),
]
