"""Whole runs that something is wrong with: what a person sees, the exit code, and what stands in the run directory."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from clip_train.data.scenes.write import write_scenes
from clip_train.exit_record import read_exit
from clip_train.health.events import read_events
from tests.test_train import losses, overrides, start


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=200, num_val=10, seed=0)
    return out


def loader_processes(trainer: int) -> list[int]:
    """Return the processes that load for `trainer`: those of its fork server."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    return [worker for child in children.get(trainer, []) for worker in children.get(child, [])]


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run_dir)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(losses(run_dir)) >= steps


@pytest.mark.slow
def test_a_run_whose_loader_hangs_ends_with_70_and_says_where_it_stood(scenes, tmp_path):
    # A step that took long stretches the limit, tenfold: the first ones of a busy machine should not count.
    run = start(overrides(scenes, tmp_path, "data.workers=1", "steps=100000", "watchdog_seconds=8"))
    wait_for_steps(tmp_path, 5)
    (worker,) = loader_processes(run.pid)
    os.kill(worker, signal.SIGSTOP)
    _, said = run.communicate(timeout=240)
    assert run.returncode == 70, said
    assert "no batch for" in said and "1 of 1 workers" in said, said
    assert read_exit(tmp_path).code == 70
    stacks = (tmp_path / "rank-000.stacks.txt").read_text()
    assert "data/workers.py" in stacks and "in next" in stacks
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "hang"]
    assert newest_batch(event["message"]) == event["step"] >= 5


def newest_batch(message: str) -> int:
    """Return the step that a message about a hang asks to replay; it has the samples that the message names."""
    first, step = re.search(r"newest batch: samples ([\d,]+) to .* --step (\d+)`", message).groups()
    assert int(first.replace(",", "")) == 12 * (int(step) - 1)
    return int(step)
