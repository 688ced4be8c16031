"""What the benchmarks share: sides that run in their own processes, interleaved rounds, and the report.

Every side is a worker process with its own interpreter, so that packages that exclude each other can be compared on one
machine. Worker and parent speak one JSON object per line over pipes: settings first, then requests.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout, also where it is not installed
RELEASE = {"release": True}  # asks a worker to give back the device's memory that it does not use
PEER_VERSION = "import importlib.metadata as m; print(m.version('open_clip_torch'))"


class Worker:
    """One side of a comparison in its own process; idle unless asked."""

    def __init__(self, script: str, *, python: str, settings: Mapping[str, Any]) -> None:
        """Start `script --worker` and wait until it has built what `settings` describe."""
        self._process = subprocess.Popen(
            [python, script, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.ask(settings)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{' '.join(self._process.args)} ended with status {self._process.wait()}; see above")
        return json.loads(reply)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(build: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Be a worker: build from the first line, then answer requests until the input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    if settings["device"] == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    answer = build(settings)
    print(json.dumps({"torch": torch.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request == RELEASE:
            torch.cuda.empty_cache()
        print(json.dumps({} if request == RELEASE else answer(request)), file=replies, flush=True)


def one_round(worker: Worker, request: Mapping[str, Any], *, untimed: Mapping[str, Any], device: str) -> float:
    """Return the seconds of a request. On CUDA the sides take turns with the memory, which would not do for all.

    There a worker takes its memory again in a request that does not count, and gives it back at the end.
    """
    if device == "cpu":
        return worker.ask(request)["seconds"]
    worker.ask(untimed)
    seconds = worker.ask(request)["seconds"]
    worker.ask(RELEASE)
    return seconds


def timed(run: Callable[[], object], *, device: str) -> float:
    """Return the seconds that `run` takes, the device idle at both ends."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Measure all sides in each round, in turning order (A B, B A, ...), so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            seconds[name].append(sides[name]())
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return the median, lowest and highest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def common_flags(parser: argparse.ArgumentParser, *, rounds: int = 5) -> None:
    """Add the flags of every benchmark."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side (default 2)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH",
        help="interpreter that has open_clip_torch (default: this one; without it, ours alone is measured)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, environment and all numbers")


def family() -> list[int]:
    """Return the ids of this process and of all that it started, directly or not."""
    parents = {int(path.name): process_fields(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found, generation = [os.getpid()], {os.getpid()}
    while generation:
        generation = {pid for pid, fields in parents.items() if fields and int(fields[1]) in generation}
        found += sorted(generation)
    return found


def process_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    except OSError:
        return []


def peer_version(python: str) -> str | None:
    """Return the version of open_clip in the interpreter `python`, or None."""
    found = subprocess.run([python, "-c", PEER_VERSION], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on besides the settings."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    cuda = {}
    if options.device == "cuda":
        from clip_train.tools.doctor.software import driver_version

        cuda = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver_version()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip_torch": peer_version(options.peer_python),
        "timm": importlib.metadata.version("timm"),
        "commit": commit.stdout.strip() or None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **cuda,
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as columns."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def shown_ratio(value: Mapping[str, float] | None) -> str:
    """Return a ratio with its spread over the rounds."""
    return "-" if value is None else f"{value['median']:.2f} ({value['lowest']:.2f}..{value['highest']:.2f})"


def finish(options: argparse.Namespace, *, started: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Say where the numbers come from, and write them if asked."""
    where = started.get("gpu") or f"{started['cpu']}, {options.threads} threads"
    loads = f"{started['load_average']:.1f} before, {os.getloadavg()[0]:.1f} after"
    peer = started["open_clip_torch"]
    print(f"\n{where}; torch {started['torch']}; {f'open_clip {peer}' if peer else 'no open_clip'}; load {loads}")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        record = {"environment": dict(started), "settings": settings, "rows": list(rows)}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
