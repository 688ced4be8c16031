"""`clip-train selftest reliability`: break runs and checkpoints in every way that needs no trick, and count."""

from __future__ import annotations

import os
import platform
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

import clip_train
from clip_train.tools.selftest.runs import check_kills, check_worlds
from clip_train.tools.selftest.saves import check_crashes, check_damage, check_full_disk

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH_IN_A_FILE = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row of the table."""

    number: str  # of the target in the project's own table
    text: str
    run: Callable[[Path, random.Random], str]
    """`run(folder, rng)` returns what was done, or raises."""


CHECKS = (
    Check(number="1", text="SIGKILL of ranks, a loader worker, the launcher and a save", run=check_kills),
    Check(number="2", text="one run on 1, 2 and again 1 process", run=check_worlds),
    Check(number="9", text="flipped bits and cuts in a checkpoint", run=check_damage),
    Check(number="10", text="SIGKILL while saving", run=check_crashes),
    Check(number="10", text="a full disk", run=check_full_disk),
)


def selftest(*, seed: int | None, keep: Path | None) -> int:
    """Run all checks, print a table, and return the exit code: 1 if a check failed.

    Args:
        seed: chooses what is broken and when; None takes one from the clock, and the table tells it.
        keep: folder for what the checks write, instead of one that is deleted.
    """
    seed = time.time_ns() % 10**6 if seed is None else seed
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_FILE)
    table = Table(title=f"clip-train {clip_train.__version__}, torch {torch.__version__}, {platform.platform()}")
    for heading in ("#", "check", "result", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    begun, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="clip-train-selftest-") as temporary:
        folder = keep or Path(temporary)
        for i, check in enumerate(CHECKS, start=1):
            console.print(f"{i} of {len(CHECKS)}: {check.text} …", highlight=False)
            start = time.monotonic()
            own = folder / f"check-{i}"
            own.mkdir(parents=True)
            try:
                result = check.run(own, random.Random(seed + i))
            except Exception as error:
                failed += 1
                console.print(traceback.format_exc(), markup=False, highlight=False)
                result = f"FAILED: {error}"
            table.add_row(check.number, check.text, result, f"{time.monotonic() - start:.0f}")
    console.print(table)
    verdict = f"{failed} of {len(CHECKS)} checks failed" if failed else f"all {len(CHECKS)} checks passed"
    minutes = (time.monotonic() - begun) / 60
    console.print(f"{verdict} in {minutes:.1f} minutes on {os.cpu_count()} cores; --seed {seed} does the same again")
    return int(failed > 0)
