"""Checkpoints that are damaged, processes that are killed while they save, and disks that are full."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clip_train.checkpoint.checkpointer import Checkpointer
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.load import newest_verified
from clip_train.distributed.world import World
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from torch import Tensor

DAMAGES = 300
CRASHES = 20
DISK_MIB = 3
CUT_EVERY = 4096
_MOUNT = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'


class _Weights:
    """Tensors that all hold one number: which save they came from can be read off."""

    def __init__(self, *, size: int) -> None:
        self.tensors = {"a": torch.zeros(size), "b": torch.zeros(7, dtype=torch.float64)}

    def fill(self, value: float) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name][...])


def check_damage(folder: Path, rng: random.Random) -> str:
    """Flip bits of a checkpoint and cut its files; each time the one before must be chosen.

    Raises:
        AssertionError: damage was not seen, or the checkpoint before it was not loaded.
    """
    checkpointer, weights = _open(folder, size=20_000)
    with checkpointer:
        for step in (1, 2):
            _save(checkpointer, weights, step)
    newest = newest_verified(folder)
    files = sorted(newest.iterdir())
    cuts = [(path, place) for path in files for place in range(0, path.stat().st_size, CUT_EVERY)]
    for i in range(DAMAGES + len(cuts)):
        path, place = cuts[i - DAMAGES] if i >= DAMAGES else (files[i % len(files)], None)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if place is None else whole[:place])
        assert newest_verified(folder, say=lambda line: None) != newest, f"damage of {path.name} was not seen"
        path.write_bytes(whole)
    files[-1].write_bytes(b"")
    assert _resumed(folder, size=20_000) == (1, 1.0), "the checkpoint before the damaged one was not loaded"
    return f"{DAMAGES} of {DAMAGES} flipped bits and {len(cuts)} of {len(cuts)} cuts found; fell back"


def check_crashes(folder: Path, rng: random.Random) -> str:
    """Kill a process while it saves without a pause; every published checkpoint must still be there.

    Raises:
        AssertionError: a checkpoint was lost, or its tensors are of several saves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])  # each process would need seconds to load torch
    published = 0
    for _ in range(CRASHES):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(folder, sender), daemon=True)
        process.start()
        sender.close()
        resumed = receiver.recv()
        assert resumed >= published, f"the checkpoint of step {published} is lost"
        while published <= resumed:
            published = receiver.recv()
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.join()
        while receiver.poll():
            try:
                published = receiver.recv()
            except EOFError:
                break
    step, value = _resumed(folder, size=100_000)
    assert step >= published and value == step, f"step {published} was published, step {step} holds {value}"
    return f"{CRASHES} kills between {step} saves: no published checkpoint lost"


def save_for_ever(folder: Path, sender: Connection) -> None:
    """Resume, then save step after step, and tell which is surely on the disk."""
    checkpointer, weights = _open(folder, size=100_000)
    resumed = checkpointer.resume("auto")
    step = resumed.step if resumed else 0
    while True:
        sender.send(step)
        step += 1
        _save(checkpointer, weights, step)


def check_full_disk(folder: Path, rng: random.Random) -> str:
    """Save on a real small file system until it is full, or else under a limit on the size of a file.

    Raises:
        AssertionError: an older checkpoint suffered, or the message does not say what is wrong.
    """
    del rng
    mounted = folder / "disk"
    mounted.mkdir()
    child = [sys.executable, "-m", __spec__.name, str(mounted)]
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, f"{DISK_MIB}m", str(mounted)]
    can_mount = shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True, check=False)
    if can_mount and can_mount.returncode == 0:
        ended = subprocess.run([*mount, *child], capture_output=True, text=True, check=False)
        where = f"on a file system of {DISK_MIB} MiB"
    else:
        ended = subprocess.run([*child, "limit"], capture_output=True, text=True, check=False)
        where = "under a limit on the size of a file (no file system can be mounted here)"
    assert ended.returncode == 0, ended.stderr[-2000:]
    return f"{where}: {ended.stdout.strip()}"


def fill_disk(folder: Path, *, limit_files: bool) -> str:
    """Save two small checkpoints and three that do not fit; say how that went."""
    lines: list[str] = []
    small, large = 10_000, DISK_MIB * 2**20 // 4 * 2
    checkpointer, weights = _open(folder, size=small, say=lines.append)
    with checkpointer:
        for step in (1, 2):
            _save(checkpointer, weights, step)
        if limit_files:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        weights.tensors["a"] = torch.zeros(large)
        failed = 0
        for step in (3, 4, 5):
            try:
                _save(checkpointer, weights, step)
            except ClipTrainError:
                failed = step
        assert failed == 5, "training stops at the third failure in a row, not before"
    reason = "File too large" if limit_files else "No space left"
    told = [line for line in lines if str(folder) in line and reason in line]
    assert len(told) >= 3, f"what is wrong and where was not said: {lines}"
    hidden = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not hidden, f"left behind: {hidden}"
    assert _resumed(folder, size=small) == (2, 2.0), "an older checkpoint suffered"
    return "told twice, stopped the third time; older checkpoints load"


def _open(folder: Path, *, size: int, say: Callable[[str], None] = lambda line: None) -> tuple[Checkpointer, _Weights]:
    weights = _Weights(size=size)
    config = CheckpointConfig(every=1, asynchronous=False)
    return Checkpointer(folder, world=World(), config=config, tensors={"model": weights}, state={}, say=say), weights


def _save(checkpointer: Checkpointer, weights: _Weights, step: int) -> None:
    weights.fill(step)
    checkpointer.save(step=step, consumed=step, config_yaml="steps: 1\n")


def _resumed(folder: Path, *, size: int) -> tuple[int, float]:
    """Start as a new process does; return the step and the number in its tensors."""
    checkpointer, weights = _open(folder, size=size)
    with checkpointer:
        resumed = checkpointer.resume("auto")
    assert resumed is not None, "no checkpoint was found"
    (value,) = {float(v) for tensor in weights.tensors.values() for v in tensor}
    return resumed.step, value


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(fill_disk(Path(sys.argv[1]), limit_files=sys.argv[2:] == ["limit"]))
