"""A grid of runs: every combination once, each a run of its own, one failure among them."""

import itertools
import signal
import time

import pytest

from clip_train.errors import UserError
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.grid import expand
from tests.tools.trials import start, tiny

DATA = ["data.train=shards", "steps=9", "optim.warmup=1"]


def test_every_combination_is_a_trial_with_its_own_name():
    trials = expand([*DATA, "name=mine", "optim.lr=3e-4,1e-3", "seed=range(0,3)", "model=tiny,tiny-rn"])
    found = {tuple(sorted(one for one in trial if one.startswith(("optim.lr", "seed", "model")))) for trial in trials}
    combinations = itertools.product(("model=tiny", "model=tiny-rn"), ("optim.lr=0.0003", "optim.lr=0.001"), (0, 1, 2))
    assert found == {(model, rate, f"seed={seed}") for model, rate, seed in combinations}
    names = [trial[-1] for trial in trials]
    assert len(set(names)) == 12 and names[0] == "name='mine-lr=0.0003-seed=0-model=tiny'"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "needs a key with several values"),
        (["optim.lr=1e-3,2e-3", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["seed=(1,2"], "seed"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_before_the_first_trial(overrides, message):
    with pytest.raises(UserError, match=message):
        expand([*DATA, *overrides])


@pytest.mark.slow
def test_a_failing_trial_is_reported_and_the_others_still_run(scenes, tmp_path):
    # The second batch size exceeds the data, which only the running trial can know.
    grid = start(tmp_path, "train", "-m", *tiny(scenes, "steps=2", "global_batch_size=8,4000"))
    shown, said = grid.communicate(timeout=600)
    assert grid.returncode == 2, said
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith("s-")}
    loss = read_metrics(tmp_path / "runs" / "s-global_batch_size=8")[-1]["train/loss"]
    assert rows["s-global_batch_size=8"][1:] == ["0", "2", f"{loss:.5g}"]
    assert rows["s-global_batch_size=4000"][1] == "2"


@pytest.mark.slow
def test_a_stopped_grid_goes_on_where_it_stood(scenes, tmp_path):
    arguments = tiny(scenes, "steps=40", "seed=0,1")
    grid = start(tmp_path, "train", "-m", *arguments)
    rows = tmp_path / "runs" / "s-seed=0" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while (not rows.exists() or len(rows.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    grid.send_signal(signal.SIGTERM)
    shown, _ = grid.communicate(timeout=600)
    assert grid.returncode == 85 and "1 of 2 trials were not started" in shown
    again = start(tmp_path, "train", "-m", *arguments)
    _, said = again.communicate(timeout=600)
    assert again.returncode == 0 and "continuing" in said
    for seed in (0, 1):
        steps = [row["step"] for row in read_metrics(tmp_path / "runs" / f"s-seed={seed}")]
        assert sorted(set(steps)) == list(range(1, 41))
