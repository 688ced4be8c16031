"""Leaving out samples on the way: the run goes on with those after them, once, and its batches can still be named."""

import shutil

import pytest

from clip_train.config import load
from clip_train.data.scenes.write import write_scenes
from clip_train.errors import UserError
from clip_train.progress import Progress
from clip_train.step import TrainStep
from clip_train.tools.replay import replay
from clip_train.train import train
from tests.test_train import overrides


@pytest.mark.slow
def test_skipped_samples_are_left_out_once_and_the_steps_after_them_can_be_replayed(tmp_path, monkeypatch):
    write_scenes(tmp_path / "scenes", num_train=400, num_val=10, seed=0)
    step, slots = TrainStep.__call__, []

    def with_record(self, batch, **arguments):
        slots.append(sorted(batch.slots.tolist()))
        return step(self, batch, **arguments)

    monkeypatch.setattr(TrainStep, "__call__", with_record)

    def run(folder, *more):
        slots.clear()
        train(load("train", overrides(tmp_path / "scenes", tmp_path / folder, "optim.schedule=constant", *more)))
        return [first for first, *_ in slots]

    run("a", "steps=10")
    origin = tmp_path / "a" / "checkpoints" / "step-00000010"
    skip = [f"resume={origin}", "data.skip_samples=30", "checkpoint.every=4"]
    # Ten steps of 12 saw 120 samples; 30 more are three batches.
    assert run("b", "steps=15", *skip) == [156 + 12 * i for i in range(5)]
    # The same command goes on from its own newest checkpoint, and skips nothing more.
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000015")
    assert run("b", "steps=16", *skip) == [156 + 12 * i for i in range(2, 6)]
    assert "step 16: samples 216 to 227" in replay(tmp_path / "b", step=16)
    with pytest.raises(UserError, match="must name one checkpoint"):
        run("a", "steps=12", f"resume={tmp_path / 'a'}", "data.skip_samples=30")
    # In place: the checkpoint's own run goes on without the samples, once.
    assert run("a", "steps=12", f"resume={origin}", "data.skip_samples=30") == [156, 168]
    assert run("a", "steps=13", f"resume={origin}", "data.skip_samples=30") == [180]


def test_skipped_samples_are_whole_batches():
    progress = Progress(None, global_batch_size=12)
    for _ in range(10):
        progress.advance(12)
    progress.skip(30)
    assert (progress.step, progress.samples_seen) == (10, 120 + 36)
    assert progress.stretches == [(0, 0, 12), (10, 156, 12)]


def test_skipping_needs_a_checkpoint_to_skip_from():
    with pytest.raises(UserError, match=r"data\.skip_samples=5 needs resume=CHECKPOINT"):
        load("train", ["data.train=x", "steps=5", "optim.warmup=0", "data.skip_samples=5"])
