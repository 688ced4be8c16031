"""Whole runs of a small model, killed and moved between numbers of processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.audit import read_audit
from clip_train.data.scenes.write import write_scenes
from clip_train.metrics.sinks import read_metrics

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

STEPS = 40
BATCH = 8
TOLERANCE = 1e-5  # sums in another order
SECONDS_TO_START = 300.0
SECONDS_TO_END = 120.0  # for ranks whose launcher or peer is gone


def check_kills(folder: Path, rng: random.Random) -> str:
    """Compare a run of two processes that is killed again and again with one that is left alone.

    Raises:
        AssertionError: a sample or a weight differs, or a process goes on alone.
    """
    shards = _shards(folder)
    _train(shards, folder / "undisturbed", steps=STEPS, processes=2)
    run_dir = folder / "disturbed"
    kills = ["rank", "worker", "save", "launcher"]
    rng.shuffle(kills)
    for what in kills:
        _train_until_killed(shards, run_dir, what=what, rng=rng)
    _train(shards, run_dir, steps=STEPS, processes=2)
    assert read_audit(run_dir) == read_audit(folder / "undisturbed"), "samples were lost or repeated"
    assert _weights(run_dir) == _weights(folder / "undisturbed"), "the weights differ"
    return f"{len(kills)} kills in {STEPS} steps: same samples, weights equal to the bit"


def check_worlds(folder: Path, rng: random.Random) -> str:
    """Compare a run that goes from one process to two and back with one that stays alone.

    Raises:
        AssertionError: a batch differs, or a loss by more than rounding.
    """
    shards = _shards(folder)
    _train(shards, folder / "alone", steps=STEPS, processes=1)
    first, second = sorted(rng.sample(range(2, STEPS - 1), 2))
    for processes, steps in ((1, first), (2, second), (1, STEPS)):
        _train(shards, folder / "moved", steps=steps, processes=processes)
    assert read_audit(folder / "moved") == read_audit(folder / "alone"), "the batches differ"
    here, there = (_losses(folder / name) for name in ("moved", "alone"))
    worst = max(abs(here[step] - there[step]) for step in range(1, STEPS + 1))
    assert worst <= TOLERANCE, f"a loss differs by {worst:.1e}"
    return f"changes after steps {first} and {second} of {STEPS}: same batches, losses within {worst:.0e}"


def _shards(folder: Path) -> Path:
    write_scenes(folder / "shards", num_train=200, num_val=10, seed=0)
    return folder / "shards" / "train"


def _start(shards: Path, run_dir: Path, *, steps: int, processes: int) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    arguments = [
        f"data.train={shards}", f"run_dir={run_dir}", f"steps={steps}", f"global_batch_size={BATCH}", "model=tiny",
        "model.embed_dim=32", "model.vision.width=64", "model.vision.heads=1", "model.text.width=32",
        "model.text.heads=1", "data.workers=1", "device=cpu", "precision=fp32", "optim.warmup=0", "optim.lr=1e-3",
        "optim.schedule=constant", "logging.every=1", "checkpoint.every=5",
    ]  # fmt: skip
    with _log(run_dir).open("a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "clip_train", "train", *arguments], stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _train(shards: Path, run_dir: Path, *, steps: int, processes: int) -> None:
    running = _start(shards, run_dir, steps=steps, processes=processes)
    try:
        code = running.wait(timeout=600)
    finally:
        _kill([*_descendants(running.pid), running.pid])
    assert code == 0, f"training ended with {code}:\n{_said(run_dir)}"


def _train_until_killed(shards: Path, run_dir: Path, *, what: str, rng: random.Random) -> None:
    """Start a run, kill something after some steps, and see to it that nothing goes on."""
    running = _start(shards, run_dir, steps=STEPS, processes=2)
    try:
        before = _steps_done(run_dir)
        target = before + rng.randrange(1, 6)
        _wait(lambda: _steps_done(run_dir) >= min(target, STEPS), running, run_dir, seconds=SECONDS_TO_START)
        if what == "save":
            folder = run_dir / "checkpoints"
            _wait(lambda: any(folder.glob(".part-*")) or _steps_done(run_dir) >= STEPS, running, run_dir)
        ranks = _children(running.pid)
        if what == "worker":
            workers = [worker for server in _children(rng.choice(ranks)) for worker in _children(server)]
            _kill(workers[:1])
            _wait(lambda: _steps_done(run_dir) >= min(target + 5, STEPS), running, run_dir)
        victims = {"launcher": [running.pid], "worker": ranks}.get(what, [rng.choice(ranks)])
        _kill(victims)
        deadline = time.monotonic() + SECONDS_TO_END
        running.wait(timeout=SECONDS_TO_END)
        while any(_is_running(pid) for pid in ranks):
            assert time.monotonic() < deadline, f"a rank goes on {SECONDS_TO_END:.0f} s after the death of a {what}"
            time.sleep(0.05)
    finally:
        _kill([*_descendants(running.pid), running.pid])
        running.wait()


def _wait(
    condition: Callable[[], bool], running: subprocess.Popen[bytes], run_dir: Path, *, seconds: float = 120.0
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no progress for {seconds:.0f} s:\n{_said(run_dir)}"
        assert running.poll() in (None, 0), f"training ended:\n{_said(run_dir)}"
        time.sleep(0.002)


def _steps_done(run_dir: Path) -> int:
    path = run_dir / "audit.bin"
    return path.stat().st_size // 8 if path.exists() else 0


def _losses(run_dir: Path) -> dict[int, float]:
    return {int(row["step"]): row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}


def _weights(run_dir: Path) -> str:
    path = run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _log(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def _said(run_dir: Path) -> str:
    return _log(run_dir).read_text(errors="replace")[-2000:]


def _processes() -> list[tuple[int, int, str]]:
    """Return process id, parent and state of every process that has not ended."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [(int(pid), int(parent), state) for pid, parent, state in rows if not state.startswith("Z")]


def _children(pid: int) -> list[int]:
    return [child for child, parent, _ in _processes() if parent == pid]


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    return [*found, *(below for child in found for below in _descendants(child))]


def _is_running(pid: int) -> bool:
    return any(pid == running for running, _, _ in _processes())


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
