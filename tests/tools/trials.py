"""Grids and sweeps of tiny runs, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path


def tiny(scenes: Path, *more: str) -> list[str]:
    """Return the overrides of a run that takes seconds."""
    return [
        f"data.train={scenes}/train", "model=tiny", "data.workers=0", "device=cpu", "precision=fp32",
        "global_batch_size=8", "optim.warmup=0", "logging.every=1", "name=s", *more,
    ]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start `clip-train` with these arguments in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "clip_train", *arguments], cwd=folder, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
