"""The trainer as a whole: it learns, it can be killed, it continues with the next sample on any number of processes."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from clip_train.checkpoint.best import best_checkpoint
from clip_train.config import from_yaml, load
from clip_train.data.index import walk
from clip_train.data.scenes.write import write_scenes
from clip_train.errors import Preempted, Stopped, TrainingFailed, UserError
from clip_train.exit_record import read_exit
from clip_train.metrics.sinks import read_metrics
from clip_train.model.config import ModelConfig
from clip_train.step import TrainStep
from clip_train.tools.sweep.trial_run import Ended, outcome_of
from clip_train.train import train
from tests.data.made import numbered_shards
from tests.launched import SECONDS_TO_START
from tests.runs import SMALL_MODEL

STEPS = 50


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=400, num_val=30, seed=0)
    return out


def overrides(scenes: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"data.train={scenes}/train", f"run_dir={run_dir}", "model=tiny", "data.workers=0", "device=cpu",
        "precision=fp32",
        f"steps={STEPS}", "global_batch_size=12", "optim.warmup=5", "optim.lr=1e-3", "logging.every=1",
        "checkpoint.every=10", *more,
    ]  # fmt: skip


def start(arguments: list[str], *, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "clip_train", "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def final_weights(run_dir: Path) -> str:
    path = run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}


@pytest.fixture(scope="module")
def undisturbed(scenes, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train(load("train", overrides(scenes, run_dir, "profile=3:4")))
    return run_dir


def test_the_loss_falls_below_that_of_guessing(undisturbed):
    values = losses(undisturbed)
    assert list(values) == list(range(1, STEPS + 1))
    assert sum(list(values.values())[-5:]) / 5 < 0.9 * values[1]


def test_a_run_killed_with_sigkill_ends_in_bit_identical_weights(scenes, undisturbed, tmp_path, capsys):
    arguments = overrides(scenes, tmp_path, "data.workers=1")
    first = start(arguments)
    deadline = time.monotonic() + SECONDS_TO_START
    while len(losses(tmp_path)) < 23 and time.monotonic() < deadline:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "checkpoints" / f"step-{STEPS:08d}").exists()
    train(load("train", arguments))
    assert f"continuing {tmp_path}" in capsys.readouterr().err
    assert final_weights(tmp_path) == final_weights(undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


def test_two_processes_continue_a_run_of_one_with_the_same_losses(scenes, tmp_path):
    small = ["optim.schedule=constant", *SMALL_MODEL]
    train(load("train", overrides(scenes, tmp_path, "steps=10", *small)))
    longer = [*small, "steps=30"]  # 20 of them on two processes
    two = start(overrides(scenes, tmp_path, *longer), processes=2)
    _, said = two.communicate(timeout=SECONDS_TO_START)
    assert two.returncode == 0, said
    alone = tmp_path / "alone"
    train(load("train", overrides(scenes, alone, *longer)))
    together, apart = losses(tmp_path), losses(alone)
    assert together.keys() == apart.keys()
    assert max(abs(together[s] - apart[s]) for s in apart) < 1e-5


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_started_again(scenes, undisturbed, tmp_path):
    arguments = overrides(scenes, tmp_path, "checkpoint.every=1000")
    first = start(arguments)
    deadline = time.monotonic() + 60
    while len(losses(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 85, said
    assert "Traceback" not in said
    train(load("train", arguments))
    assert final_weights(tmp_path) == final_weights(undisturbed)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Stopped), (signal.SIGTERM, Preempted)])
def test_a_run_that_is_asked_to_stop_while_it_indexes_leaves_after_a_shard(tmp_path, monkeypatch, number, error):
    numbered_shards(tmp_path / "train", [6, 6, 6])
    index_shard, indexed = walk.index_shard, []

    def with_signal(path, **arguments):
        indexed.append(path)
        os.kill(os.getpid(), number)
        return index_shard(path, **arguments)

    monkeypatch.setattr(walk, "index_shard", with_signal)
    with pytest.raises(error, match="before training began"):
        train(load("train", overrides(tmp_path, tmp_path / "run")))
    assert len(indexed) == 1
    assert read_exit(tmp_path / "run").code == error.exit_code
    assert outcome_of(tmp_path / "run").ended is Ended.stopped, "a sweep goes on with it"


def test_a_finished_run_started_again_changes_nothing(scenes, undisturbed):
    before = final_weights(undisturbed), losses(undisturbed)
    train(load("train", overrides(scenes, undisturbed)))
    assert (final_weights(undisturbed), losses(undisturbed)) == before


def test_another_model_in_the_same_run_directory_is_refused_with_the_difference(scenes, undisturbed):
    with pytest.raises(UserError, match=r"model\.vision\.layers: 2 -> 3"):
        train(load("train", overrides(scenes, undisturbed, "model.vision.layers=3", f"steps={STEPS + 10}")))


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_refused_with_the_difference(scenes, undisturbed, tmp_path):
    name = f"step-{STEPS:08d}"
    shutil.copytree(undisturbed / "checkpoints" / name, tmp_path / "checkpoints" / name)
    with pytest.raises(UserError, match=rf"{name} is of a run with another config.*\n  seed: 0 -> 1$"):
        train(load("train", overrides(scenes, tmp_path, "seed=1", f"steps={STEPS + 10}")))


def test_gradient_caching_gives_the_losses_of_the_whole_batch(scenes, undisturbed, tmp_path):
    train(load("train", overrides(scenes, tmp_path, "micro_batch_size=4", "steps=10", "optim.schedule=constant")))
    whole = tmp_path / "whole"
    train(load("train", overrides(scenes, whole, "micro_batch_size=auto", "steps=10", "optim.schedule=constant")))
    assert from_yaml(whole / "config.yaml").micro_batch_size == 12
    cached, plain = losses(tmp_path), losses(whole)
    assert max(abs(cached[s] - plain[s]) for s in plain) < 1e-5


def break_images(monkeypatch, *calls: int):
    """Make the image tower return NaN in these forward passes, counted from 1; return every batch's slots in order."""
    build, step = ModelConfig.build, TrainStep.__call__
    passes, slots, weights = Counter(), [], []

    def with_fault(config, **runtime):
        model = build(config, **runtime)

        def hook(module, _inputs, output):
            passes["image"] += 1
            weights.append(hashlib.sha256(module.proj.detach().numpy().tobytes()).hexdigest())
            return output * float("nan") if passes["image"] in calls else output

        model.visual.register_forward_hook(hook)
        return model

    def with_record(self, batch, **arguments):
        slots.append(batch.slots.sort().values.tolist())
        return step(self, batch, **arguments)

    monkeypatch.setattr(ModelConfig, "build", with_fault)
    monkeypatch.setattr(TrainStep, "__call__", with_record)
    return slots, weights


def test_a_rewound_run_goes_back_to_the_checkpoint_and_on_with_the_next_sample(scenes, tmp_path, monkeypatch):
    slots, weights = break_images(monkeypatch, 15)
    train(load("train", overrides(scenes, tmp_path, "steps=25", "on_nonfinite=rewind")))
    # Step 15 is seen to be broken while step 16 is under way: steps 11 to 16 are taken again, on new data.
    assert len(slots) == 25 + 6
    assert [slot for batch in slots for slot in batch] == list(range(12 * 31))
    assert weights[16] == weights[10]
    assert list(losses(tmp_path)) == list(range(1, 26)) and all(v is not None for v in losses(tmp_path).values())
    rows = [row for row in read_metrics(tmp_path) if row["step"] == 25]
    assert rows[0]["samples_seen"] == 12 * 31


@pytest.mark.slow
def test_a_run_that_breaks_after_every_rewind_ends_with_the_reason(scenes, tmp_path, monkeypatch):
    slots, _ = break_images(monkeypatch, *range(12, 400))
    with pytest.raises(TrainingFailed, match="rewound 3 times to step 10"):
        train(load("train", overrides(scenes, tmp_path, "steps=25", "on_nonfinite=rewind")))
    assert len(slots) == 13 + 2 * 3


@pytest.mark.slow
def test_a_run_that_went_back_beyond_its_newest_save_saves_again_when_it_is_stopped(scenes, tmp_path, monkeypatch):
    break_images(monkeypatch, 13)
    step, newest = TrainStep.__call__, tmp_path / "checkpoints" / "step-00000010"
    calls = Counter()

    def with_trouble(self, batch, **arguments):
        calls["step"] += 1
        if calls["step"] == 14:  # the rewind that follows has to pass over the newest checkpoint
            (newest / "model.safetensors").write_bytes(b"")
        if calls["step"] == 14 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, **arguments)

    monkeypatch.setattr(TrainStep, "__call__", with_trouble)
    saves = ["checkpoint.every=5", "checkpoint.asynchronous=false"]  # so that the newest is there to be broken
    train(load("train", overrides(scenes, tmp_path, "steps=99", *saves, "on_nonfinite=rewind")))
    assert (tmp_path / "checkpoints" / "step-00000008" / "MANIFEST.json").exists()


@pytest.mark.slow
def test_a_run_that_began_at_a_checkpoint_of_another_run_is_rewound_to_it(scenes, undisturbed, tmp_path, monkeypatch):
    slots, weights = break_images(monkeypatch, 3)
    start = undisturbed / "checkpoints" / "step-00000040"
    train(load("train", overrides(scenes, tmp_path, f"resume={start}", "on_nonfinite=rewind")))
    # Step 43 is seen to be broken while step 44 is under way: all four are taken again, on new data.
    assert weights[4] == weights[0] and len(slots) == 4 + 10
    assert list(losses(tmp_path)) == list(range(41, 51))


def test_nothing_to_rewind_to_is_said(scenes, tmp_path, monkeypatch):
    break_images(monkeypatch, 3)
    with pytest.raises(TrainingFailed, match="nothing to rewind to"):
        train(load("train", overrides(scenes, tmp_path, "steps=25", "on_nonfinite=rewind")))


@pytest.mark.parametrize("name", ["val", "-val_ema"])
def test_a_best_metric_that_its_evaluation_does_not_give_is_refused_before_the_first_step(scenes, tmp_path, name):
    best = [f"checkpoint.best={name}/recall@1", "evaluation=[val]", f"data.val={scenes}/val", "optim.ema_decay=0.8"]
    with pytest.raises(
        UserError, match=rf"checkpoint.best={name}/recall@1 is not one of .*{name.lstrip('-')}/mean_recall@1"
    ):
        train(load("train", overrides(scenes, tmp_path, "steps=9", *best)))
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["val/image_retrieval_recall@10", "val_ema/image_retrieval_recall@10", "-val/loss"])
def test_the_best_checkpoint_is_saved_when_an_evaluation_beats_the_former(scenes, tmp_path, name):
    best = ["evaluation=[val]", f"evaluation.val.shards={scenes}/val", "evaluation.val.every=15", "data.val=null"]
    best.append("optim.ema_decay=0.8")
    best.append(f"checkpoint.best={name}")
    train(load("train", overrides(scenes, tmp_path, "steps=120", "global_batch_size=64", "optim.lr=2e-3", *best)))
    metric, sign = name.removeprefix("-"), -1 if name.startswith("-") else 1
    scores = {row["step"]: sign * row[metric] for row in read_metrics(tmp_path) if metric in row}
    assert len(scores) >= 3  # until then the model counts as collapsed
    winner = max(scores, key=lambda step: (scores[step], -step))
    assert best_checkpoint(tmp_path).name == f"step-{winner:08d}"


@pytest.mark.slow
def test_wandb_offline_writes_the_run_and_no_source_code(scenes, tmp_path):
    train(load("train", overrides(scenes, tmp_path, "steps=6", "logging.wandb=offline")))
    files = [p for p in (tmp_path / "wandb").rglob("*") if p.is_file()]
    written = next(p for p in files if p.suffix == ".wandb")
    assert b"train/loss" in written.read_bytes()
    assert not [p for p in files if p.suffix in {".py", ".patch"}]


def test_metrics_are_json_lines_with_steps_and_samples(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in rows if "train/loss" in r]
    assert all(r["samples_seen"] == 12 * r["step"] for r in logged)
    expected = {
        "train/logit_scale",
        "train/in_batch_recall@1",
        "train/learning_rate",
        "perf/samples_per_second",
        "perf/data_wait",
        "perf/exposed_communication",
        "perf/memory_gib",
    }
    assert expected <= logged[-1].keys()
    assert "perf/mfu" not in logged[-1]  # nobody sells CPUs by their FLOP


def test_a_trace_shows_the_chosen_steps_and_no_other(undisturbed):
    (path,) = (undisturbed / "profile").iterdir()
    assert path.name == "steps-3-4-rank-0.json.gz"
    with gzip.open(path) as file:
        names = Counter(event["name"] for event in json.load(file)["traceEvents"])
    assert names["aten::_fused_adamw_"] == 2 * 2  # parameter groups
