"""A process that hangs says where, and ends; one that is only slow, or was suspended, lives."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from clip_train.health.watchdog import Watchdog

SCRIPT = """
import sys, threading, time
from pathlib import Path
from clip_train.health.watchdog import Watchdog

rank, ranks, seconds, stacks_after = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
dog = Watchdog(
    Path(sys.argv[1]), rank=rank, ranks=ranks, seconds=seconds, stacks_after=stacks_after or None,
    state=lambda: ["waiting for Godot"], loader=lambda: None, sign=lambda: None,
    on_hang=lambda message: print("told:", message, flush=True), on_silence=print,
)

def wait_for_godot():
    time.sleep(600)

with dog:
    dog.stepped(1)
"""


def start(
    folder: Path, body: str, *, rank: int = 0, ranks: int = 1, seconds: float, stacks_after: float = 0
) -> subprocess.Popen:
    script = SCRIPT + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), *map(str, (rank, ranks, seconds, stacks_after))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip


def test_a_hung_process_writes_its_stacks_and_ends_with_70(tmp_path):
    process = start(tmp_path, "dog.stepped(7); wait_for_godot()", seconds=0.5)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 70
    stacks = (tmp_path / "rank-000.stacks.txt").read_text()
    assert "in wait_for_godot" in stacks and "waiting for Godot" in stacks
    assert "in wait_for_godot" in error
    assert "told: rank 0: no sign of life for" in out and "after step 7; waiting for Godot" in out


@pytest.mark.slow
def test_the_ranks_that_live_name_the_one_that_was_stopped(tmp_path):
    first = start(tmp_path, "wait_for_godot()", rank=0, ranks=3, seconds=2)
    third = start(tmp_path, "wait_for_godot()", rank=2, ranks=3, seconds=2)
    stopped = start(tmp_path, "wait_for_godot()", rank=1, ranks=3, seconds=2)
    stopped.send_signal(signal.SIGSTOP)
    try:
        for process in (first, third):
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 70
            assert "no word from rank 1:" in out
    finally:
        stopped.kill()
        stopped.communicate()


@pytest.mark.slow
def test_a_process_that_was_suspended_for_longer_than_the_limit_goes_on(tmp_path):
    process = start(tmp_path, "print('up', flush=True)\ntime.sleep(4)\nprint('done')", seconds=5)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "done\n", error
    assert not (tmp_path / "rank-000.stacks.txt").exists()


@pytest.mark.slow
def test_native_code_that_keeps_the_interpreter_leaves_its_stack(tmp_path):
    # Matching this pattern takes for ever, and the interpreter's lock is held all the while.
    body = """
    import re
    time.sleep(0.5)
    def keep_the_interpreter():
        re.match("(a+)+$", "a" * 40 + "b")
    keep_the_interpreter()
    """
    process = start(tmp_path, body, seconds=1)
    path, deadline = tmp_path / "rank-000.stacks.txt", time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and "keep_the_interpreter" in path.read_text()):
        time.sleep(0.2)
    process.kill()
    process.communicate()
    assert "in keep_the_interpreter" in path.read_text()


@pytest.mark.slow
def test_the_stacks_are_written_before_a_collective_gives_up_and_the_process_goes_on(tmp_path):
    body = """
    def slow_step():
        time.sleep(2)
    slow_step()
    dog.stepped(2)
    print("done")
    """
    process = start(tmp_path, body, seconds=30, stacks_after=0.5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "done\n"
    stacks = (tmp_path / "rank-000.stacks.txt").read_text()
    assert "in slow_step" in stacks and stacks.count("waiting for Godot") == 1


def test_a_loader_that_is_rebuilt_is_a_sign_of_life(tmp_path):
    looks = []

    def sign():
        looks.append(watchdog._silent)
        if len(looks) > 6:
            watchdog._closed.set()
        return len(looks) > 4

    watchdog, _ = dog(tmp_path, seconds=None, sign=sign)
    watchdog._look = 0.01
    watchdog._watch()
    # The fifth look sees the rebuild; from the sixth on the silence counts anew.
    assert 0 < looks[2] < looks[3] < looks[4]
    assert looks[5] < looks[4]


def dog(tmp_path, **changes):
    said = []
    chosen = {"seconds": 10.0, "stacks_after": None, "loader": lambda: None, "sign": lambda: 0, **changes}
    watchdog = Watchdog(tmp_path, rank=3, ranks=4, state=list, on_hang=said.append, on_silence=said.append, **chosen)
    return watchdog, said


def test_start_evaluations_and_slow_steps_have_longer(tmp_path):
    watchdog, _ = dog(tmp_path)
    assert watchdog.limit == 120  # the first step compiles
    watchdog.stepped(1)
    assert watchdog.limit == 10
    watchdog._silent = 4.0  # as its thread counts while the second step lasts
    watchdog.stepped(2)
    assert watchdog.limit == 40
    watchdog.entered("an evaluation")
    watchdog._silent = 100.0
    assert watchdog.limit == 120
    watchdog.stepped(3)
    assert watchdog.limit == 40  # an evaluation is no step


def test_a_silent_loader_is_reported_once_a_wait_with_its_reason(tmp_path):
    waits = iter([29.0, 31.0, 32.0, None, 5.0, 40.0])

    def loader():
        seconds = next(waits)
        return None if seconds is None else (seconds, "4 of 4 workers reading 00012.tar for 30 s")

    watchdog, said = dog(tmp_path, loader=loader)
    for _ in range(6):
        watchdog._watch_loader()
    reason = "4 of 4 workers reading 00012.tar for 30 s"
    assert said == [f"rank 3: no batch for 31 s: {reason}", f"rank 3: no batch for 40 s: {reason}"]
