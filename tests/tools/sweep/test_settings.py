"""What a sweep is: its metric, its runs and its places are checked before the first trial."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from clip_train.config import load
from clip_train.errors import TrainingFailed, UserError
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.sweep_config import SweepOptions
from clip_train.tools.sweep.command import sweep_command
from clip_train.tools.sweep.devices import slots_of
from clip_train.tools.sweep.objective import Objective, objective_of, require_intermediate
from clip_train.tools.sweep.settings import read_settings
from clip_train.tools.sweep.trial_run import Ended, outcome_of
from tests.tools.sweep.settings import settings

RUN = ["data.train=x", "model=tiny", "steps=20", "optim.warmup=0"]
LR = "sweep.space.optim.lr=log(1e-5,1e-2)"


def slow(*values):
    """Cases that compose several configs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LR, "optim.lr=1"], r"optim.lr=1 and sweep.space.optim.lr=log.*give it a value or a range"),
        ([LR, "sweep.trails=3"], "did you mean 'sweep.trials'"),
        slow([LR, "run_dir=x"], "run_dir=x: each trial has a run_dir of its own"),
        slow(["sweep.space.seed=int(0,3)", "sweep.seeds=2"], "the seed is varied by one of them"),
        slow(["sweep.space.optim.lrr=log(1,2)"], "did you mean 'optim.lr'"),
        slow(["sweep.space.optim.schedule=choice(cosine,slow)"], "optim.schedule"),
        slow(["sweep.space.steps=int(5,30)", "optim.warmup=9"], "optim.warmup=9 must be below steps=5"),
        slow([LR, "launch=local"], "launch=local: the sweep starts its runs"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_the_first_trial(overrides, message):
    swept = {one.partition("=")[0].removeprefix("sweep.space.") for one in overrides}
    with pytest.raises(UserError, match=message):
        read_settings([*(one for one in RUN if one.partition("=")[0] not in swept), *overrides])


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "clip-train\[sweep\]"'):
        sweep_command([*RUN, LR])


def test_a_metric_that_runs_do_not_give_ends_the_sweep_and_one_that_a_trial_lost_ends_that_trial(tmp_path):
    row = {"step": 9, "samples_seen": 90, "val/mean_recall@1": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TrainingFailed, match="val/mean_recall@1 is not finite"):
        Objective(metric="val/mean_recall@1", smaller_is_better=False).final(tmp_path)
    with pytest.raises(UserError, match=r"no val/acc1 for sweep\.metric; there are val/mean_recall@1"):
        Objective(metric="val/acc1", smaller_is_better=False).final(tmp_path)


def test_the_metric_is_that_of_the_best_checkpoint_else_of_an_evaluation_else_the_loss():
    plain = load("train", RUN)
    assert objective_of(plain, metric=None).metric == "train/loss"
    assert objective_of(plain, metric=None).direction == "minimize"
    demo = load("train", ["experiment=demo"])
    found = objective_of(demo, metric=None)
    assert (found.metric, found.direction) == ("val/mean_recall@1", "maximize")
    chosen = replace(demo, checkpoint=replace(demo.checkpoint, best="-scenes/acc1"))
    assert objective_of(chosen, metric=None).direction == "minimize"
    assert objective_of(chosen, metric="val/acc1").metric == "val/acc1"
    with pytest.raises(UserError, match=r"sweep.metric=vla/acc1 must be a metric of these runs; there are train/…"):
        objective_of(plain, metric="vla/acc1")


def test_a_pruner_needs_a_metric_during_training_and_a_length():
    loss = Objective(metric="train/loss", smaller_is_better=True)
    config = settings().base
    require_intermediate(loss, config=config, pruner="asha")
    with pytest.raises(UserError, match="needs steps= or samples=, not epochs="):
        require_intermediate(loss, config=replace(config, steps=None, epochs=2), pruner="asha")
    config = replace(config, evaluation={"val": RetrieveConfig(name="retrieve", shards="x")})
    with pytest.raises(UserError, match=r"give evaluation\.val\.every="):
        require_intermediate(settings().objective, config=config, pruner="asha")


def test_each_run_has_its_folder_name_and_seed_and_the_ranks_that_were_asked_for():
    swept = settings(seeds=3, processes_per_trial=2)
    folder, arguments = swept.run_of({"optim.lr": "0.1"}, number=7, seed=2)
    assert str(folder) == "sweeps/demo/trial-007-seed-2"
    assert arguments == [
        "experiment=demo", "optim.lr=0.1", "seed=2", "launch=local", "launch.processes=2",
        "name=demo & more-trial-007-seed-2", "run_dir=sweeps/demo/trial-007-seed-2",
    ]  # fmt: skip


def test_trials_are_packed_onto_the_gpus_that_can_be_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f,5,6,7")

    def places(**options):
        return [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(SweepOptions(**options), device="auto")]

    assert places() == ["3", "GPU-8f", "5", "6", "7"]
    assert places(processes_per_trial=2) == ["3,GPU-8f", "5,6"]
    assert places(processes_per_trial=2, parallel=3) == ["3,GPU-8f", "5,6", "3,GPU-8f"]
    with pytest.raises(UserError, match=r"sweep.processes_per_trial=6: only 5 GPUs"):
        places(processes_per_trial=6)


def test_runs_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slots = slots_of(SweepOptions(parallel=2, processes_per_trial=3), device="cpu")
    assert [slot.environment for slot in slots] == [{"OMP_NUM_THREADS": "2"}] * 2
    assert [slot.environment for slot in slots_of(SweepOptions(), device="cpu")] == [{}]


@pytest.mark.parametrize(
    ("content", "ended"),
    [
        (None, Ended.unknown),
        ((0, "finished"), Ended.finished),
        ((0, "stopped: time limit"), Ended.finished),
        ((0, "stopped: interrupted"), Ended.stopped),
        ((85, "stopped: preempted"), Ended.stopped),
        ((1, "loss is not finite"), Ended.failed),
    ],
)
def test_a_run_is_judged_by_its_own_record(tmp_path, content, ended):
    if content is not None:
        code, reason = content
        record = f'{{"code": {code}, "reason": "{reason}", "step": 3, "time": "", "launch_id": ""}}'
        (tmp_path / "exit.json").write_text(record)
    assert outcome_of(tmp_path).ended is ended
