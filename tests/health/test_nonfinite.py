"""A number that is not finite: every rank decides alike, and the message says where it came from."""

import pytest
import torch

from clip_train.config import load
from clip_train.errors import TrainingFailed
from clip_train.health.events import read_events
from clip_train.health.monitor import RunHealth
from clip_train.health.nonfinite import NonfiniteSteps
from clip_train.schema import OnNonfinite
from clip_train.step import StepResult, TrainStep
from clip_train.train import train
from tests.health.test_runs import newest_batch, scenes  # noqa: F401 - a fixture
from tests.test_train import break_images, overrides
from tests.torture.faults import ROWS


def test_the_message_names_step_rank_samples_gradient_and_the_command(scenes, tmp_path, monkeypatch):  # noqa: F811
    slots, _ = break_images(monkeypatch, 3)
    enter, compute, waiting = RunHealth.__enter__, TrainStep.__call__, []
    monkeypatch.setattr(RunHealth, "__enter__", lambda health: waiting.append(health) or enter(health))
    monkeypatch.setattr(TrainStep, "__call__", lambda *a, **k: waiting.append(waiting[0]._state()) or compute(*a, **k))
    with pytest.raises(TrainingFailed) as failure:
        train(load("train", overrides(scenes, tmp_path, "steps=9", "optim.warmup=2")))
    said = str(failure.value)
    assert "not finite at step 3: rank 0: image features of 12 of 12 rows, slots " in said
    named = said.partition("slots ")[2]
    assert int(named.split()[0]) in slots[2] and "(000000.tar, sample " in named
    assert "first gradient that is not finite: " in said
    assert f"`clip-train shards replay {tmp_path} --step 3`" in said
    for step, state in enumerate(waiting[1:], start=1):  # what a watchdog would have said amid each step
        assert newest_batch(state[1]) == step
    (event,) = read_events(tmp_path)
    assert event["kind"] == "nonfinite" and event["step"] == 3 and event["action"] == "stop"


def outcome(*, finite):
    zero = torch.zeros(())
    return StepResult(
        loss=zero, in_batch_recall=zero, grad_norm=zero, logit_scale=zero, skipped=torch.tensor(not finite),
        finite=torch.tensor(finite), grad_norms=zero, image_features=zero, text_features=zero,
    )  # fmt: skip


def test_ten_skipped_steps_end_a_run_only_in_a_row():
    steps = NonfiniteSteps(OnNonfinite.skip_step, found=lambda step, _result, _slots: f"fault at step {step}")
    for step in range(1, 31):  # nine bad ones and a good one, three times
        assert not steps.watch(outcome(finite=step % 10 == 0), slots=torch.arange(4), step=step)
    for step in range(31, 41):
        steps.watch(outcome(finite=False), slots=torch.arange(4), step=step)
    assert steps.total == 27 + 9  # the newest is not judged yet
    with pytest.raises(TrainingFailed, match="fault at step 40"):
        steps.judge()


def test_a_run_goes_back_to_one_checkpoint_three_times():
    steps = NonfiniteSteps(OnNonfinite.rewind, found=lambda *_: "")
    for step in (10, 20, 20, 20):
        steps.rewound_to(step)
    with pytest.raises(TrainingFailed, match="rewound 3 times to step 20"):
        steps.rewound_to(20)


@pytest.mark.slow
def test_a_fault_on_one_of_two_ranks_is_judged_alike_in_twenty_cases():
    assert [outcome for outcome in ROWS[0].run(0, 20, 0) if outcome.error] == []


@pytest.mark.slow
def test_a_flipped_bit_is_found_in_a_trained_replica():
    assert [outcome for outcome in ROWS[1].run(0, 8, 0) if outcome.error] == []
