"""The launch templates, run as they are: with stand-ins for SLURM's programs and, in fast tests, for the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launched import arguments, attempts, require_exact_audit, saved_steps, steps_done

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Prints its config, or ends as told; with `wait` after SIGUSR1 only.
TRAINER = """#!/bin/bash
if [[ "$*" == *--cfg* ]]; then echo "name: x"; echo "run_dir: $RUN"; exit 0; fi
if [ -n "$WAIT" ]; then
    trap 'stopped=1' USR1
    touch "$RUN/started"
    while [ -z "$stopped" ]; do sleep 0.05; done
fi
if [ -n "$CODE" ]; then echo "{\\"code\\": $CODE, \\"reason\\": \\"a\\"}" > "$RUN/exit.json"; fi
exit "$LEAVES_WITH"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
# As srun does: starts every task, passes signals on, ends with the highest code.
SRUN_OF_TWO = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    wait "$task"; ended=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; ended=$?; done
    ((ended > code)) && code=$ended
done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$RUN.scontrol"
[ "$1" = show ] && echo 127.0.0.1
exit 0
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def slurm(folder: Path, *more: str, srun: str = SRUN, **variables: str) -> subprocess.Popen:
    """Start scripts/slurm.sh as SLURM does, with `folder/run` as the run's directory."""
    (folder / "run").mkdir(exist_ok=True)
    program(folder / "bin" / "srun", srun)
    program(folder / "bin" / "scontrol", SCONTROL)
    environment = {
        **os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "RUN": f"{folder}/run", "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NODELIST": "node[1-2]", "PYTHON": str(program(folder / "bin" / "trainer", TRAINER)), **variables,
    }  # fmt: skip
    return subprocess.Popen([SCRIPTS / "slurm.sh", *more], env=environment, stderr=subprocess.PIPE, text=True)


def asked_of_slurm(folder: Path) -> list[str]:
    return (folder / "run.scontrol").read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "leaves_with", "expected", "requeued"),
    [("0", "0", 0, False), ("85", "1", 85, True), ("70", "70", 70, True), ("3", "1", 3, False), ("", "9", 9, False)],
)
def test_the_slurm_template_ends_as_the_run_did_and_requeues_what_can_go_on(
    tmp_path, code, leaves_with, expected, requeued
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 85, "reason": "of another launch"}')
    job = slurm(tmp_path, CODE=code, LEAVES_WITH=leaves_with)
    job.communicate(timeout=60)
    assert job.returncode == expected
    assert asked_of_slurm(tmp_path) == ["show hostnames node[1-2]", *(["requeue 4321"] if requeued else [])]


def test_the_slurm_template_passes_the_warning_on_and_requeues_once(tmp_path):
    job = slurm(tmp_path, CODE="", LEAVES_WITH="143", WAIT="yes")  # as ranks that had not begun
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "started").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 85
    assert asked_of_slurm(tmp_path)[1:] == ["requeue 4321"]


@pytest.mark.slow
def test_a_job_of_two_ranks_is_warned_requeued_and_finished_under_slurm(tmp_path):
    real = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    job = slurm(tmp_path, *arguments(tmp_path), srun=SRUN_OF_TWO, **real)
    deadline = time.monotonic() + 240
    while steps_done(tmp_path / "run") < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 85, said
    assert asked_of_slurm(tmp_path)[1:] == [f"requeue {os.getpid()}"]
    step = steps_done(tmp_path / "run")
    assert saved_steps(tmp_path / "run")[-1] == step
    more = arguments(tmp_path, f"steps={step + 5}")
    again = slurm(tmp_path, *more, srun=SRUN_OF_TWO, SLURM_RESTART_COUNT="1", **real)
    _, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert len(asked_of_slurm(tmp_path)) == 3  # and no other requeue
    assert [line["first_step"] for line in attempts(tmp_path / "run")] == [0, step]
    require_exact_audit(tmp_path / "run", steps=step + 5)


@pytest.mark.slow
def test_the_torchrun_template_leaves_with_the_code_of_the_run(tmp_path):
    environment = {
        **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "PROCESSES": "2",
    }  # fmt: skip
    for number, code, steps in ((signal.SIGUSR1, 85, 100000), (signal.SIGINT, 0, 100000), (None, 0, 400)):
        former = steps_done(tmp_path / "run")
        command = [SCRIPTS / "torchrun.sh", *arguments(tmp_path, f"steps={former + 4 if number is None else steps}")]
        # A shell's background jobs ignore SIGINT, their children inherit that, and bash cannot trap what it inherits.
        heeding = ["env", "--default-signal=INT", *command]
        job = subprocess.Popen(heeding, env=environment, stderr=subprocess.PIPE, text=True)
        if number is not None:
            deadline = time.monotonic() + 240
            while steps_done(tmp_path / "run") < former + 3:
                assert time.monotonic() < deadline and job.poll() is None
                time.sleep(0.05)
            job.send_signal(number)
        _, said = job.communicate(timeout=240)
        assert job.returncode == code, said
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == code
        assert saved_steps(tmp_path / "run")[-1] == steps_done(tmp_path / "run")
