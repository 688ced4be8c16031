"""A run that goes from one number of processes to another: the same batches, the same losses up to rounding."""

import random
from functools import cache
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.data.made import numbered_shards
from tests.runs import RunningRanks, arguments_of, batches_of, losses_of, weights_of

COUNTS = [130, 45, 225]
BATCH = 24  # every world below divides it
WORLDS = (1, 2, 3, 4, 6, 8)
PAIRS = random.Random(0).sample(list(permutations(WORLDS, 2)), 30)  # any beginning of it has some of each
WORKERS = (0, 1, 2, 3, 5)
STEPS = 200
LEARNING_RATE = 1e-4  # as far as the warm-up of a real run gets in that many steps
TOLERANCE = 1e-5


def run(shards: Path, run_dir: Path, *, steps: int, ranks: int = 1, workers: int = 0) -> None:
    arguments = arguments_of(shards, run_dir, steps=steps, batch=BATCH, workers=workers, learning_rate=LEARNING_RATE)
    running = RunningRanks(arguments, run_dir.with_suffix(".log"), ranks=ranks)
    try:
        running.finish(seconds=1800)
    finally:
        running.kill()


@cache
def of_one_process(steps: int) -> tuple[list[int], dict[int, float], str]:
    """Return batches, losses and weights of a run that one process without workers does from start to end."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        run(numbered_shards(folder / "shards", COUNTS), folder / "run", steps=steps)
        return batches_of(folder / "run"), losses_of(folder / "run"), weights_of(folder / "run", steps=steps)


def check_change_of_world(folder: Path, first: int, second: int, *, rng: random.Random) -> float:
    """Go from one number of processes to another at a random step; return the largest difference of a loss."""
    batches, losses, _ = of_one_process(STEPS)
    shards, run_dir = numbered_shards(folder / "shards", COUNTS), folder / "run"
    for ranks, steps in ((first, rng.randrange(1, STEPS)), (second, STEPS)):
        run(shards, run_dir, steps=steps, ranks=ranks)
    assert batches_of(run_dir) == batches
    found = losses_of(run_dir)
    assert found.keys() == losses.keys()
    worst = max(abs(found[step] - losses[step]) for step in losses)
    assert worst <= TOLERANCE, f"{first} to {second} processes: a loss differs by {worst:.1e}"
    return worst


def check_changes_of_workers(folder: Path, *, steps: int, rng: random.Random) -> None:
    """Change the number of loader processes at random steps and compare the weights bit for bit."""
    shards, run_dir = numbered_shards(folder / "shards", COUNTS), folder / "run"
    changes = sorted(rng.sample(range(1, steps), len(WORKERS) - 1))
    for workers, end in zip(rng.sample(WORKERS, len(WORKERS)), [*changes, steps], strict=True):
        run(shards, run_dir, steps=end, workers=workers)
    batches, _, weights = of_one_process(steps)
    assert batches_of(run_dir) == batches
    assert weights_of(run_dir, steps=steps) == weights


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 3), (4, 1), (3, 2)])
def test_another_number_of_processes_sees_the_same_batches_and_losses(tmp_path, first, second):
    check_change_of_world(tmp_path, first, second, rng=random.Random(first))


@pytest.mark.slow
def test_another_number_of_workers_changes_no_bit(tmp_path):
    check_changes_of_workers(tmp_path, steps=40, rng=random.Random(0))
