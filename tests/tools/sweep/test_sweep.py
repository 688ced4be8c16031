"""Whole sweeps of tiny runs: killed, resumed, pruned, with failing trials. The files say what must come out."""

import json
import os
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from clip_train.tools.sweep.settings import read_settings
from clip_train.tools.sweep.study import Study
from tests.tools.trials import start, tiny

pytestmark = pytest.mark.slow
SECONDS = 900  # for anything that is waited for: the machine may be busy


def sweep(folder: Path, scenes: Path, *more: str) -> subprocess.Popen:
    return start(folder, "sweep", *tiny(scenes, *more))


def wait_until(happened, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def rows_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends_of(run: Path) -> list[dict]:
    path = run / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table_of(shown: str) -> dict[int, list[str]]:
    """Cells by trial: the second is the metric, the last ones say what became of it."""
    rows = [line.split() for line in shown.splitlines()]
    return {int(cells[0]): cells for cells in rows if cells and cells[0].isdigit() and cells[1] != "of"}


def test_a_killed_sweep_with_failing_trials_ends_with_the_right_best_trial_and_runs_none_twice(scenes, tmp_path):
    steps, trials = 30, 12
    arguments = [f"steps={steps}", f"sweep.trials={trials}", "sweep.space.optim.lr=log(1e-6,1e-1)"]
    folder = tmp_path / "sweeps" / "s"
    for number, name in ((2, "config.yaml"), (9, "lock")):  # what no run of this sweep can have left there
        (folder / f"trial-{number:03d}").mkdir(parents=True)
        (folder / f"trial-{number:03d}" / name).write_text("name: another\n")

    first = sweep(tmp_path, scenes, *arguments)
    victim = folder / "trial-004"
    wait_until((victim / "lock").exists, first)
    os.kill(json.loads((victim / "lock").read_text())["pid"], signal.SIGKILL)
    running = folder / "trial-006"
    wait_until(lambda: len(rows_of(running)) >= 3, first)
    first.kill()
    first.communicate()
    steps_before = len(rows_of(running))
    wait_until((running / "exit.json").exists)  # the trial has noticed, saved and left
    stopped_at = json.loads((running / "exit.json").read_text())
    assert stopped_at["code"] == 85 and steps_before <= stopped_at["step"] < steps

    again = sweep(tmp_path, scenes, *arguments)
    shown, said = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    losses = {}
    for number in range(trials):
        run = folder / f"trial-{number:03d}"
        attempts = ends_of(run)
        if number in (2, 4, 9):
            assert len(attempts) <= 1
            continue
        assert [row["step"] for row in rows_of(run) if "train/loss" in row] == list(range(1, steps + 1))
        expected = [(0, stopped_at["step"]), (stopped_at["step"], steps)] if number == 6 else [(0, steps)]
        assert [(one["first_step"], one["last_step"]) for one in attempts] == expected
        losses[number] = rows_of(run)[-1]["train/loss"]
    assert len(losses) == trials - 3 and not (folder / f"trial-{trials:03d}").exists()
    best = min(losses, key=losses.get)
    table = table_of(shown)
    assert list(table)[: len(losses)] == sorted(losses, key=losses.get)
    assert table[best][1] == f"{losses[best]:.5g}"
    rate = table[best][2]
    assert f"best, trial {best}: " in shown and f"optim.lr={rate} name=s-best" in shown
    config = (folder / f"trial-{best:03d}" / "config.yaml").read_text()
    assert f"lr: {float(rate)}" in config
    for number, reason in ((2, "another config"), (4, "killed by SIGKILL"), (9, "not a lock file")):
        assert table[number][1] == "–" and reason in " ".join(table[number])

    idle = sweep(tmp_path, scenes, *arguments)
    assert idle.communicate(timeout=SECONDS)[0] == shown and idle.returncode == 0
    assert all(len(ends_of(run)) <= 2 for run in folder.glob("trial-*"))


def test_asha_stops_the_trials_that_its_paper_would_stop(scenes, tmp_path):
    steps = 150
    arguments = [f"steps={steps}", "sweep.trials=6", "sweep.space.optim.lr=log(1e-7,1e-2)"]
    done = sweep(tmp_path, scenes, *arguments, "sweep.pruner=asha", "sweep.sampler=random", "checkpoint.keep=2")
    shown, said = done.communicate(timeout=SECONDS)
    assert done.returncode == 0, said
    rungs: dict[int, list[float]] = {10: [], 40: []}
    expected = {}
    for number in range(6):
        run = tmp_path / "sweeps" / "s" / f"trial-{number:03d}"
        rows = rows_of(run)
        for percent, values in rungs.items():
            loss = next((row["train/loss"] for row in rows if 100 * row["step"] // steps >= percent), None)
            assert loss is not None
            values.append(loss)
            if loss > sorted(values)[max(1, len(values) // 4) - 1]:
                expected[number] = percent
                break
        assert (rows[-1]["step"] < steps) == (number in expected)
        code = json.loads((run / "exit.json").read_text())["code"]
        assert code == (85 if number in expected else 0)
    pruned = {number for number, cells in table_of(shown).items() if "pruned" in cells}
    assert pruned == set(expected) and pruned


def test_seeds_are_averaged_and_trials_share_the_cores(scenes, tmp_path):
    arguments = ["steps=12", "sweep.trials=2", "sweep.space.optim.lr=choice(1e-4,1e-2)"]
    done = sweep(tmp_path, scenes, *arguments, "seed=5", "sweep.seeds=3", "sweep.parallel=2", "sweep.sampler_seed=1")
    shown, said = done.communicate(timeout=SECONDS)
    assert done.returncode == 0, said
    for number, cells in table_of(shown).items():
        runs = [tmp_path / "sweeps" / "s" / f"trial-{number:03d}-seed-{seed}" for seed in range(3)]
        assert [f"seed: {5 + seed}\n" in (run / "config.yaml").read_text() for seed, run in enumerate(runs)] == [
            True
        ] * 3
        losses = [rows_of(run)[-1]["train/loss"] for run in runs]
        assert len(set(losses)) == 3
        assert cells[1] == f"{statistics.mean(losses):.5g}"
        assert cells[2] == f"{statistics.stdev(losses) / 3**0.5:.2g}"
    assert "on place 1" in said and "on place 2" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 0)])
def test_a_stopped_sweep_stops_all_trials_and_goes_on_where_they_stood(scenes, tmp_path, number, code):
    arguments = ["steps=60", "sweep.trials=2", "sweep.parallel=2", "sweep.space.optim.lr=log(1e-5,1e-2)"]
    first = sweep(tmp_path, scenes, *arguments)
    runs = [tmp_path / "sweeps" / "s" / f"trial-{trial:03d}" for trial in range(2)]
    wait_until(lambda: all(len(rows_of(run)) >= 2 for run in runs), first)
    first.send_signal(number)
    _, said = first.communicate(timeout=SECONDS)
    assert first.returncode == code and "the same command goes on" in said
    stops = [json.loads((run / "exit.json").read_text())["step"] for run in runs]
    again = sweep(tmp_path, scenes, *arguments)
    _, said = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    for run, stop in zip(runs, stops, strict=True):
        assert [row["step"] for row in rows_of(run)] == list(range(1, 61))
        expected = [(0, stop), (stop, 60)] if stop < 60 else [(0, 60)]
        assert [(one["first_step"], one["last_step"]) for one in ends_of(run)] == expected


def test_too_many_failures_end_the_sweep(scenes, tmp_path):
    arguments = ["steps=2", "sweep.trials=9", "sweep.max_failures=1", "sweep.space.optim.lr=log(1e-5,1e-2)"]
    done = sweep(tmp_path, scenes / "nowhere", *arguments)
    shown, said = done.communicate(timeout=SECONDS)
    assert done.returncode == 1 and "more trials failed than sweep.max_failures=1" in said
    assert len(table_of(shown)) == 2 and "nowhere" in shown


def test_a_trial_that_outlived_its_sweep_is_waited_for_and_not_run_again(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["steps=60", "sweep.trials=1", "sweep.space.optim.lr=log(1e-5,1e-2)"]
    settings = read_settings(tiny(scenes, *arguments))
    settings.folder.mkdir(parents=True)
    settings.require_same()
    direction = settings.objective.direction
    trial = Study(settings.folder, space=settings.space, options=settings.options, direction=direction).ask()
    run, of_run = settings.run_of(trial.values, number=trial.number, seed=0)
    monkeypatch.chdir(Path(__file__).parents[3])
    run = tmp_path / run
    alone = start(tmp_path, "train", *of_run)
    wait_until((run / "lock").exists, alone)
    again = sweep(tmp_path, scenes, *arguments)
    _, said = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    alone.communicate(timeout=SECONDS)
    assert alone.returncode == 0
    assert [(one["first_step"], one["last_step"]) for one in ends_of(run)] == [(0, 60)]
    assert f"{rows_of(run)[-1]['train/loss']:.5g}, the best so far" in said


def test_a_trial_trains_on_as_many_ranks_as_it_was_given(scenes, tmp_path):
    arguments = ["steps=3", "sweep.trials=1", "sweep.processes_per_trial=2", "sweep.space.optim.lr=log(1e-5,1e-2)"]
    done = sweep(tmp_path, scenes, *arguments)
    shown, said = done.communicate(timeout=SECONDS)
    assert done.returncode == 0, said
    (attempt,) = ends_of(tmp_path / "sweeps" / "s" / "trial-000")
    assert (attempt["world"], attempt["last_step"]) == (2, 3)
    assert "launch.processes" not in shown  # how many is no part of the best values
