"""What `clip-train runs` says about runs is what their files say, and it deletes none that is alive."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from clip_train.checkpoint.lock import RunLock
from clip_train.errors import ClipTrainError, UserError
from clip_train.exit_record import ExitRecord
from clip_train.tools.compare.sources import open_sides
from clip_train.tools.report import write_report
from clip_train.tools.run import Run
from clip_train.tools.runs.command import list_runs, remove_runs, show_run
from clip_train.tools.runs.summary import Status, find_runs, summarise
from tests.tools.synthetic_run import write_run as write_synthetic_run

ATTEMPT = {"host": "h", "world": 2, "device": "cpu", "first_step": 0, "launch_id": "l", "start": "2026-01-01T00:00:00"}


def write_run(run_dir, *, steps=2000):
    return write_synthetic_run(run_dir, steps=steps, results=False)


def end(run_dir, *, code, reason):
    ExitRecord(code=code, reason=reason, step=7, time="t", launch_id="l").write(run_dir)


def save(run_dir, *, step, epoch_samples=5120):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    data = {"segments": [{"sources": [{"epoch_samples": epoch_samples}]}]}
    (folder / "train_state.json").write_text(json.dumps({"progress": {"data": data}}))


@pytest.mark.parametrize(
    ("code", "reason", "status", "shown"),
    [
        (0, "finished", Status.finished, ""),
        (0, "stopped: interrupted", Status.stopped, "interrupted"),
        (85, "stopped: preempted", Status.stopped, "preempted"),
        (3, "shard 4 is damaged", Status.failed, "exit code 3: shard 4 is damaged"),
    ],
)
def test_the_status_is_that_of_the_exit_record(tmp_path, code, reason, status, shown):
    run = write_run(tmp_path / "a")
    end(run, code=code, reason=reason)
    summary = summarise(run)
    assert (summary.status, summary.reason) == (status, shown)


def test_a_run_without_an_exit_record_is_judged_by_its_attempts_and_its_length(tmp_path):
    short, whole, killed = (write_run(tmp_path / name, steps=n) for name, n in (("a", 400), ("b", 2000), ("c", 400)))
    (killed / "attempts.jsonl").write_text(json.dumps({**ATTEMPT, "code": None}) + "\n")
    assert [summarise(run).status for run in (short, whole, killed)] == [
        Status.stopped, Status.finished, Status.failed,
    ]  # fmt: skip
    assert summarise(killed).reason.startswith("killed")


def test_a_run_that_holds_its_lock_is_running_with_the_time_it_still_needs(tmp_path):
    run = write_run(tmp_path / "a", steps=400)
    end(run, code=0, reason="finished")
    lock = RunLock(run)
    summary = summarise(run)
    assert summary.status is Status.running
    assert summary.seconds_left == pytest.approx(1600 * 0.11)
    lock.release()
    assert summarise(run).status is Status.finished


def test_step_best_and_size_are_those_of_the_files(tmp_path):
    run = write_run(tmp_path / "a", steps=1200)
    save(run, step=1400)
    summary = summarise(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((row["shapes/acc1"], row["step"]) for row in rows if "shapes/acc1" in row)
    assert summary.best == ("shapes/acc1", *best)
    assert (summary.step, summary.total_steps, summary.resumable_step) == (1400, 2000, 1400)
    apparent = subprocess.run(
        ["find", run, "-type", "f", "-printf", "%s\n"], capture_output=True, text=True, check=True
    )
    assert summary.size_bytes == sum(map(int, apparent.stdout.split()))


def test_a_length_in_epochs_is_told_by_a_checkpoint_and_unknown_before(tmp_path):
    run = write_run(tmp_path / "a", steps=400)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2000", "steps: null\nepochs: 30"))
    assert summarise(run).total_steps is None
    save(run, step=300)
    assert summarise(run).total_steps == 30 * 5120 // 256


def test_the_list_has_every_run_below_a_folder_and_no_checkpoint_of_one(tmp_path, capsys):
    runs = [write_run(tmp_path / name, steps=400) for name in ("b", "sweep/one", "sweep/two")]
    (runs[0] / "checkpoints" / "step-00000001").mkdir(parents=True)
    (runs[0] / "checkpoints" / "step-00000001" / "config.yaml").write_text("name: x\n")
    end(runs[1], code=1, reason="loss is not finite")
    assert list(find_runs(tmp_path)) == runs
    assert list_runs(tmp_path, where=None, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "sweep/one" in shown and "exit code 1: loss is not finite" in " ".join(shown.split())
    assert list_runs(tmp_path, where="status==failed and shapes/acc1>0.1", as_json=True) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["path"], found["reason"]) == (str(runs[1]), "exit code 1: loss is not finite")
    with pytest.raises(UserError, match="did you mean 'shapes/acc1'"):
        list_runs(tmp_path, where="shape/acc1>0.1", as_json=False)
    (runs[2] / "config.yaml").write_text("- no\n- config\n")
    assert list_runs(tmp_path, where=None, as_json=False) == 3
    assert "two" in capsys.readouterr().err
    assert list_runs(tmp_path, where="shape/acc1>0.1", as_json=False) == 3  # which may have such a metric
    assert "two" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert list_runs(tmp_path / "empty", where="step>=5", as_json=False) == 0


def test_a_run_is_shown_with_its_attempts_and_scores(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    (run / "attempts.jsonl").write_text(
        json.dumps({**ATTEMPT, "code": 0, "end": "2026-01-01T03:00:00"}) + "\n"
    )  # fmt: skip
    show_run(run)
    lines = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert "1 on 2 x cpu, 6.00 device hours" in lines["attempts"]
    assert lines["model.name"].strip() == "tiny"
    assert lines["val/loss"].strip() == f"{1.5 + 4 * math.exp(-3):.4f}"
    assert lines["val/mean_recall@1"].strip() == f"{100 * (0.6 - 0.55 * math.exp(-3)):.2f} %"


def test_only_dead_runs_are_deleted_and_only_after_a_yes(tmp_path, monkeypatch, capsys):
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with pytest.raises(UserError, match="--yes"):
        remove_runs([run], yes=False)  # standard input of a test is no terminal
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert remove_runs([run], yes=False) == 1 and run.exists()
    lock = RunLock(other)
    with pytest.raises(UserError, match="in use"):
        remove_runs([run, other], yes=True)
    assert run.exists() and other.exists()
    lock.release()
    (tmp_path / "link").symlink_to(run)
    for wrong in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError):
            remove_runs([wrong], yes=True)
    project = tmp_path / "project"  # of another program
    project.mkdir()
    (project / "config.yaml").write_text("name: all my work\nsteps: none\n")
    with pytest.raises(UserError, match="not a run directory"):
        remove_runs([run, project], yes=True)
    monkeypatch.chdir(other)
    assert remove_runs([run, Path(), run], yes=True) == 0
    assert not run.exists() and not other.exists() and project.exists()


def test_a_config_of_another_program_is_no_run_and_hides_none(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("steps: none\n")
    write_run(tmp_path / "runs" / "a")
    assert list_runs(tmp_path, where=None, as_json=True) == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out)] == [2000]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"steps: abc\nrun_dir: x\nglobal_batch_size: 1\n"])
def test_a_damaged_config_is_one_line_of_every_command(tmp_path, damage):
    run = write_run(tmp_path / "a")
    (run / "config.yaml").write_bytes(damage)
    with pytest.raises(ClipTrainError, match=r"config\.yaml"):
        summarise(run)
    if damage == b"\xff\xfe":
        for read in (write_report, lambda run: Run(run).config, lambda run: open_sides([str(run), "."])):
            with pytest.raises(UserError, match="is not UTF-8 text"):
                read(run)
