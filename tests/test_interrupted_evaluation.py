"""A run that is asked to stop amid an evaluation saves at once, and does that evaluation, whole and once, later."""

import os
import signal

import numpy as np
import pytest

from clip_train import locked_tower
from clip_train.config import load
from clip_train.data.scenes.write import write_scenes
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.errors import Preempted
from clip_train.evaluation.features import PrefixEncoder
from clip_train.evaluation.interruptible import Interrupted, InterruptibleEncoder
from clip_train.exit_record import read_exit
from clip_train.metrics.sinks import read_metrics
from clip_train.model.clip import CLIP
from clip_train.model.zoo import create_model
from clip_train.train import train
from tests.evaluation.classify.test_classify import make
from tests.evaluation.probe.test_probe import make as make_probe
from tests.evaluation.toys import ToyModel, random_pixels, toy_setting
from tests.gloo import run_on_ranks
from tests.runs import SMALL_MODEL

EVERY = 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=60, num_val=20, seed=0)
    return out


def overrides(scenes, run_dir, *more):
    return [
        f"data.train={scenes}/train", f"data.val={scenes}/val", f"run_dir={run_dir}", *SMALL_MODEL, "device=cpu",
        "data.workers=0", "precision=fp32", "steps=4", "global_batch_size=12", "optim.warmup=0", "optim.lr=1e-3",
        "logging.every=1", "evaluation=[val]", f"evaluation.val.every={EVERY}", "evaluation.val.batch_size=5", *more,
    ]  # fmt: skip


def scores(run_dir):
    """The rows of evaluations, in their order."""
    kept = [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(run_dir)]
    return [row for row in kept if "train/loss" not in row]


def weights(run_dir):
    return (run_dir / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()


def stop_at_picture_batch(number, monkeypatch):
    """Send this process SIGTERM in one batch of pictures of the next evaluations, counted from 1; list the batches."""
    encode, seen = CLIP.encode_image, []

    def with_signal(self, images, **options):
        if not self.training:
            seen.append(len(images))
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images, **options)

    monkeypatch.setattr(CLIP, "encode_image", with_signal)
    return seen


@pytest.mark.parametrize(
    "stops",  # amid the last evaluation; amid the first one, then the last one, twice
    [[(4 + 1, 4)], pytest.param([(2, EVERY), (4 + 1, 4), (1, 4)], marks=pytest.mark.slow)],
)
def test_an_evaluation_that_was_left_is_done_again_and_stands_once_in_the_metrics(scenes, tmp_path, monkeypatch, stops):
    train(load("train", overrides(scenes, tmp_path / "undisturbed")))
    run = overrides(scenes, tmp_path / "run")
    for batch, step in stops:  # each evaluation has four batches of pictures
        with monkeypatch.context() as patch:
            seen = stop_at_picture_batch(batch, patch)
            with pytest.raises(Preempted, match=f"saved at step {step}"):
                train(load("train", run))
        assert len(seen) == batch, "it goes on after the batch in which it was asked to stop"
        record = read_exit(tmp_path / "run")
        assert record is not None and (record.code, record.step) == (85, step)
        assert [row["step"] for row in scores(tmp_path / "run")] == list(range(EVERY, step, EVERY))
    train(load("train", run))
    assert scores(tmp_path / "run") == scores(tmp_path / "undisturbed")
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


@pytest.mark.slow
def test_an_evaluation_that_is_done_again_and_then_lost_to_a_kill_still_stands_once(scenes, tmp_path, monkeypatch):
    run = overrides(scenes, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at_picture_batch(2, patch)
        with pytest.raises(Preempted):
            train(load("train", run))
    with monkeypatch.context() as patch:
        stop_at_picture_batch(4 + 1, patch)  # after step 4; as if a kill had come instead of the save
        with pytest.raises(Preempted):
            train(load("train", run))
    for path in (tmp_path / "run" / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000004").rmdir()
    train(load("train", run))
    assert [row["step"] for row in scores(tmp_path / "run")] == [EVERY, 4]


@pytest.mark.slow
def test_features_of_a_locked_tower_go_on_where_they_were_left(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(locked_tower, "BATCH_SIZE", 16)
    run = overrides(scenes, tmp_path / "run", "model.vision.unlocked_blocks=0", "model.vision.cache_features=true")
    with monkeypatch.context() as patch:
        seen = stop_at_picture_batch(2, patch)
        with pytest.raises(Preempted, match="asked to stop: before the first step; the same command starts there"):
            train(load("train", run))
    assert seen == [16, 16]
    record = read_exit(tmp_path / "run")
    assert record is not None and (record.code, record.step) == (85, 0)
    with monkeypatch.context() as patch:
        seen = stop_at_picture_batch(None, patch)
        train(load("train", run))
    assert seen[:2] == [16, 16] and seen[2:] == [5] * 8  # the other 28 of 60, then two evaluations


def leave_when_rank_one_is_asked(world):
    """Return after how many batches this rank left, and why; rank 1 alone is asked to, in the third batch."""
    evaluator, _, _ = make(22, world=world)
    evaluator.setting = toy_setting(random_pixels(22, size=64), world=world, batch_size=4)
    model = create_model("tiny", seed=1, text={"vocab_size": 1000})
    batches = []

    def wanted():
        batches.append(world.rank)
        return StopReason.preempted if world.rank == 1 and len(batches) >= 3 else StopReason.none

    try:
        evaluator.evaluate(InterruptibleEncoder(model, wanted=wanted, world=world))
    except Interrupted as interrupted:
        return len(batches), interrupted.reason, model.training
    return None


@pytest.mark.slow
def test_all_ranks_leave_before_the_same_batch_for_the_reason_of_one():
    assert run_on_ranks(leave_when_rank_one_is_asked) == [(3, StopReason.preempted, True)] * 2


@pytest.mark.parametrize("cut", [False, True])
def test_a_fit_of_a_probe_is_left_too(cut):
    probe, train_images, test_images = make_probe(40)
    batches, asked = sum(-(-len(images.labels) // 4) for images in (train_images, test_images)), []

    def wanted():
        asked.append(None)
        return StopReason.preempted if len(asked) == batches + 3 else StopReason.none

    with pytest.raises(Interrupted):
        encoder = InterruptibleEncoder(ToyModel(seed=1), wanted=wanted, world=World())
        probe.evaluate(PrefixEncoder(encoder, embed_dim=4, full=12) if cut else encoder)
    assert len(asked) == batches + 3, "the third pass of a fit is the one that was left"


def test_whoever_is_not_asked_to_stop_gets_the_same_scores():
    evaluator, _, _ = make(22)
    evaluator.setting = toy_setting(random_pixels(22, size=64), world=World(), batch_size=4)
    model = create_model("tiny", seed=1, text={"vocab_size": 1000})
    encoder = InterruptibleEncoder(model, wanted=lambda: StopReason.none, world=evaluator.world)
    asked, plain = evaluator.evaluate(encoder), evaluator.evaluate(model)
    assert asked.metrics == plain.metrics
    np.testing.assert_equal(asked.predictions, plain.predictions)
