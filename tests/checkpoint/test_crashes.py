"""A full disk after any number of bytes, and crashes while several ranks write one checkpoint."""

import shutil
import threading

import pytest
import torch

from clip_train.checkpoint.commit import Commits
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.load import load_tensors, newest_verified
from clip_train.checkpoint.publish import clear_leftovers
from clip_train.checkpoint.retention import list_checkpoints
from clip_train.checkpoint.snapshot import Snapshot
from clip_train.checkpoint.tensors import TensorFile
from clip_train.distributed.world import World
from clip_train.errors import ClipTrainError
from tests.checkpoint.faults import Disk, PowerLoss, Quota, Ranks
from tests.checkpoint.parts import open_fixed, save_steps

RANKS = 2
ROWS = 300


def fill_the_disk(folder, monkeypatch, *, point: int, points: int = 50) -> None:
    """Let the disk be full after `point` of `points` equal shares of a checkpoint, for three saves in a row."""
    save_steps(folder, 1, 2)
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "step-00000002").iterdir())
    lines: list[str] = []
    checkpointer, part = open_fixed(folder, lines=lines)
    with checkpointer:
        for step in (3, 4, 5):
            part.fill(step)
            with Quota(folder, num_bytes=size * point // points).installed(monkeypatch) as quota:
                try:
                    checkpointer.save(step=step, consumed=step, config_yaml="")
                except ClipTrainError as error:
                    assert step == 5 and "step-00000005 was not saved: No space left" in str(error)
                else:
                    assert step < 5, "training goes on after the third failure in a row"
            assert quota.was_full
            assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")] == []
        for step, line in enumerate(lines, start=3):
            assert line.startswith(f"{folder}/checkpoints/step-0000000{step} was not saved: No space left: ")
            assert "MiB needed" in line and "MiB free" in line and f"failure {step - 2} of 3" in line
        assert len(lines) == 3
        assert checkpointer.resume("auto").step == 2 and part.value == 2.0
        part.fill(6)
        checkpointer.save(step=6, consumed=6, config_yaml="")
        assert checkpointer.resume("auto").step == 6 and part.value == 6.0


@pytest.mark.parametrize("point", [0, 1, 25, 49])
def test_a_disk_that_is_full_after_some_bytes_keeps_training_and_the_older_checkpoints(quick_path, monkeypatch, point):
    fill_the_disk(quick_path, monkeypatch, point=point)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_of_50_points_keeps_training_and_the_older_checkpoints(quick_path, monkeypatch):
    for point in range(50):
        fill_the_disk(quick_path / str(point), monkeypatch, point=point)


def save_together(run_dir, *, step: int) -> list[str]:
    """Let two ranks write their rows of a tensor that holds the step; return what a user reads."""
    ranks, said, losses = Ranks(RANKS), [], []

    def save(rank: int) -> None:
        world = World(rank=rank, size=RANKS)
        commits = Commits(
            run_dir, world=world, config=CheckpointConfig(), copies=None, say=said.append, is_shared=False
        )
        commits._writers = ranks.writers(rank)
        own = TensorFile(tensors={"a": torch.full((ROWS // 2,), float(step))}, rows={"a": (ROWS // 2 * rank, ROWS)})
        snapshot = Snapshot(
            step=step, consumed=step, files={f"model-0000{rank + 1}-of-00002.safetensors": own},
            texts={"train_state.json": b"{}"} if world.is_main else {}, is_shared=True, num_bytes=4 * ROWS,
        )  # fmt: skip
        try:
            commits.commit(snapshot, healthy=True)
        except PowerLoss as error:
            losses.append(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if losses:
        raise losses[0]
    return said


def saved_together(run_dir) -> float:
    """Clear up as a new run does and return the value in the newest checkpoint, which must be of one save."""
    clear_leftovers(run_dir / "checkpoints")
    lines: list[str] = []
    (value,) = set(load_tensors(newest_verified(run_dir, say=lines.append), "model")["a"].tolist())
    assert not lines, "a half-written checkpoint was visible"
    return value


@pytest.mark.parametrize("target", [3, 2], ids=["a new step", "a step again"])
def test_a_power_loss_at_any_operation_of_two_ranks_leaves_the_new_or_the_previous_checkpoint(
    quick_path, monkeypatch, target
):
    run_dir, before = quick_path / "run", quick_path / "before"
    (before / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        save_together(before, step=step)
    if target == 2:  # under that name stands a checkpoint of another line of training
        first, second = list_checkpoints(before)[::-1]
        shutil.rmtree(second)
        first.rename(second)
    fail_at = 0
    while True:
        fail_at += 1
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(before, run_dir)
        disk = Disk(run_dir, fail_at=fail_at)
        try:
            with disk.installed(monkeypatch):
                save_together(run_dir, step=target)
        except PowerLoss:
            assert saved_together(run_dir) in ((2.0, 3.0) if target == 3 else (1.0, 2.0))
        else:
            break
    assert fail_at > 20
    assert saved_together(run_dir) == target


def test_a_disk_error_of_any_rank_costs_this_checkpoint_and_no_other(quick_path, monkeypatch):
    run_dir = quick_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    save_together(run_dir, step=1)
    size = sum(path.stat().st_size for path in list_checkpoints(run_dir)[0].iterdir())
    for point in range(10):
        with Quota(run_dir, num_bytes=size * point // 10).installed(monkeypatch) as quota:
            said = save_together(run_dir, step=2)
        assert quota.was_full and "step-00000002 was not saved: No space left" in said[0]
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
