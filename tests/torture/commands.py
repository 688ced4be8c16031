"""Targets that a command of the project shows by itself."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.torture.row import Row, each

ROOT = Path(__file__).parents[2]


def succeeds(*arguments: str) -> None:
    """Run Python with these arguments from the root of the project."""
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"


def the_catalogue(_: int) -> None:
    """Run all items, in a folder of their own: the default one is emptied by later runs of pytest."""
    with TemporaryDirectory() as folder:
        succeeds("-m", "pytest", "-m", "catalogue", "--basetemp", folder, "tests")


ROWS = [
    Row(
        number=14,
        part="b",
        text="80 of 80 items of the catalogue of bad input",
        nightly=1,
        run=each(the_catalogue),
    ),
    Row(
        number=16,
        text="200,000 samples, some damaged: memory grows by less than 2 MB per process, no open file is left",
        nightly=1,
        run=each(lambda seed: succeeds("scripts/check_memory.py")),
    ),
    Row(
        number=17,
        text="all guards, timed alone, at most 1 % of a step of 4,096 pairs; a save holds it up for a step at most",
        nightly=1,
        run=each(lambda seed: succeeds("scripts/bench_guards.py")),
    ),
    Row(
        number=18,
        text="clip-train selftest reliability",
        nightly=1,
        run=each(lambda seed: succeeds("-m", "clip_train", "selftest", "reliability", "--seed", str(seed))),
    ),
]
