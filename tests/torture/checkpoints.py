"""Damaged checkpoints, crashes at every operation of a save, full disks: the tests of tests/checkpoint, at length."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.checkpoint import test_crashes, test_publish
from tests.checkpoint.conftest import memory_folder
from tests.checkpoint.test_damage import damage_once, two_checkpoints
from tests.torture.row import Outcome, Row, each, outcome_of

POINTS = 50


@contextmanager
def folder() -> Iterator[Path]:
    """Give a folder in memory where there is one, for a time."""
    with TemporaryDirectory(dir=memory_folder()) as name:
        yield Path(name)


def damage(start: int, count: int, seed: int) -> Iterator[Outcome]:
    """Damage one checkpoint again and again; each case repairs what it did."""
    with folder() as parent:
        run_dir = two_checkpoints(parent / "run")
        for index in range(start, start + count):
            yield outcome_of(lambda case: damage_once(run_dir, seed=case, resume=True), seed + index)


def every_operation(sweep: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """Return one of the tests that fail each operation of a save in turn."""
    return (
        test_publish.test_a_power_loss_at_any_operation_of_a_save_leaves_the_new_or_the_previous_checkpoint,
        test_publish.test_a_power_loss_while_the_only_checkpoint_is_replaced_leaves_the_old_or_the_new,
        lambda path, patch: disk_errors(path, patch, errno.ENOSPC),
        lambda path, patch: disk_errors(path, patch, errno.EIO),
        lambda path, patch: two_ranks(path, patch, 3),
        lambda path, patch: two_ranks(path, patch, 2),
        test_crashes.test_a_disk_error_of_any_rank_costs_this_checkpoint_and_no_other,
    )[sweep]


SWEEPS = 7
disk_errors = test_publish.test_a_disk_error_at_any_operation_keeps_training_and_the_older_checkpoints
two_ranks = test_crashes.test_a_power_loss_at_any_operation_of_two_ranks_leaves_the_new_or_the_previous_checkpoint


def crash(seed: int) -> None:
    """Fail every operation of a save in turn."""
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        every_operation(seed % SWEEPS)(path, patch)


def full_disk(seed: int) -> None:
    """Let the disk be full after some share of a checkpoint."""
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        test_crashes.fill_the_disk(path / "run", patch, point=seed % POINTS, points=POINTS)


ROWS = [
    Row(
        number=9,
        text="checkpoints with a flipped bit or cut: found, and the one before is loaded",
        nightly=10_000,
        run=damage,
    ),
    Row(
        number=10,
        part="a",
        text="sweeps of a crash or an error at every write, flush and rename: a checkpoint at most one interval old",
        nightly=SWEEPS,
        run=each(crash),
    ),
    Row(
        number=10,
        part="b",
        text="a full disk after each fiftieth of a checkpoint: told, survived twice, stops the third time",
        nightly=POINTS,
        run=each(full_disk),
    ),
]
