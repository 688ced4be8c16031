"""A run of two ranks whose ranks and loader workers are killed at random: not one sample is lost or repeated."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clip_train.config import load
from clip_train.data.audit import read_audit
from clip_train.data.order import SourceOrder, key
from clip_train.train import train
from tests.data.made import numbered_shards

COUNTS = [130, 45, 225]
BATCH = 8
RANKS = 2


def _arguments(shards: Path, run_dir: Path, *, steps: int) -> list[str]:
    return [
        f"data.train={shards}", f"run_dir={run_dir}", f"steps={steps}", f"global_batch_size={BATCH}", "model=tiny",
        "data.workers=2", "device=cpu", "precision=fp32", "optim.warmup=0", "optim.lr=1e-3", "logging.every=10",
        "checkpoint.every=5", "distributed.timeout_seconds=60",
    ]  # fmt: skip


def _rank(rank: int, port: int, arguments: list[str], log: Path) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    with log.open("a") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), sys.__stderr__.fileno())
        train(load("train", arguments))


def _start(arguments: list[str], log: Path) -> list:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clip_train.train", "torch.distributed.checkpoint.state_dict"])
    ranks = [context.Process(target=_rank, args=(rank, port, arguments, log)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    return ranks


def _children(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                children.append(int(path.parent.name))
    return children


def _workers(rank) -> list[int]:
    """Loader processes are the children of the server that the rank started."""
    return [worker for server in _children(rank.pid) for worker in _children(server)]


def _steps_done(run_dir: Path) -> int:
    path = run_dir / "audit.bin"
    return path.stat().st_size // 8 if path.exists() else 0


def _wait(condition, ranks, log: Path, *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        assert all(process.exitcode in (None, 0) for process in ranks), log.read_text()[-3000:]
        time.sleep(0.005)


def _train_through(kills: list[str], shards: Path, run_dir: Path, *, steps: int, rng: random.Random) -> None:
    """Kill a rank or a worker every few steps, starting the run again after each killed rank."""
    arguments, log, left = _arguments(shards, run_dir, steps=steps), run_dir.with_suffix(".log"), list(kills)
    ranks = _start(arguments, log)
    try:
        while left:
            begin = _steps_done(run_dir)
            _wait(lambda: _steps_done(run_dir) != begin, ranks, log)  # noqa: B023
            target = _steps_done(run_dir) + rng.randrange(7)
            _wait(lambda: _steps_done(run_dir) >= target or _steps_done(run_dir) == steps, ranks, log)  # noqa: B023
            time.sleep(rng.random() * 0.05)
            victim, what = rng.choice(ranks), left.pop()
            workers = _workers(victim)
            if what == "worker" and workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                continue
            victim.kill()
            for process in ranks:  # the other one must notice, and not wait for ever
                process.join(90)
                assert process.exitcode is not None, "a rank hangs after the death of another"
            ranks = _start(arguments, log)
        for process in ranks:
            process.join(300)
            assert process.exitcode == 0, log.read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()


def _weights(run_dir: Path, *, steps: int) -> str:
    path = run_dir / "checkpoints" / f"step-{steps:08d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check(tmp_path: Path, *, kills: int, steps: int) -> None:
    shards = numbered_shards(tmp_path / "shards", COUNTS)
    rng = random.Random(kills)
    # At most three workers in the life of a process, after which it would give up.
    chosen = [what for _ in range(kills // 2) for what in ("worker", "rank")] + ["rank"] * (kills % 2)
    _train_through([], shards, tmp_path / "undisturbed", steps=steps, rng=rng)
    _train_through(chosen, shards, tmp_path / "disturbed", steps=steps, rng=rng)
    assert _steps_done(tmp_path / "disturbed") == steps
    order = SourceOrder(COUNTS, name="train", seed=0)
    places = np.stack(order.locate(np.arange(steps * BATCH)), axis=1).tolist()
    expected = [
        sum(key(order.sid, shard, index) for shard, index in places[step * BATCH : (step + 1) * BATCH]) % 2**64
        for step in range(steps)
    ]
    assert read_audit(tmp_path / "disturbed") == expected == read_audit(tmp_path / "undisturbed")
    assert _weights(tmp_path / "disturbed", steps=steps) == _weights(tmp_path / "undisturbed", steps=steps)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("kills", "steps"), [(3, 60), (25, 300)])
def test_a_run_killed_at_random_shows_every_sample_once_and_ends_in_the_same_weights(tmp_path, kills, steps):
    _check(tmp_path, kills=kills, steps=steps)
