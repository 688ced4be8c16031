"""Time and memory of the contrastive loss, forward and backward, against open_clip's `ClipLoss`.

    python scripts/bench_loss.py --pairs 2048 8192 --json loss.json
    python scripts/bench_loss.py --pairs 32768 --device cuda --precision bf16 --peer-python /opt/open_clip/bin/python

One process, one rank. Rounds are interleaved (ours, theirs, theirs, ours, ...), ratios are medians over rounds, and
each measurement runs in a fresh process. Memory is the peak above that of the features: allocated on CUDA, resident on
a CPU. Both sides run under autocast where --precision says so, as they do in training.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


def main() -> None:
    """Measure as the command line says."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    rows = []
    for pairs in options.pairs:
        rounds: dict[str, list[dict[str, float]]] = {"ours": [], "open_clip": []}
        for i in range(options.rounds):
            for side in ("ours", "open_clip") if i % 2 == 0 else ("open_clip", "ours"):
                if side == "open_clip" and pairs > options.peer_limit:
                    continue
                rounds[side].append(in_fresh_process(side, pairs, options))
        rows.append(summary(pairs, rounds))
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(options), "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2048, 8192], help="batch sizes")
    parser.add_argument("--width", type=int, default=512, help="embedding width")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds per batch size")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per round, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has open_clip_torch")
    parser.add_argument("--peer-limit", type=int, default=2**62, help="largest batch to give to open_clip")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--measure", choices=["ours", "open_clip"], help=argparse.SUPPRESS)
    return parser.parse_args()


def in_fresh_process(side: str, pairs: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure one side once."""
    python = options.peer_python if side == "open_clip" else sys.executable
    names = ("width", "device", "precision", "repeats", "threads")
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    command = [python, __file__, f"--measure={side}", f"--pairs={pairs}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of one forward and backward pass, and the bytes at their peak above the features."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(options.pairs[0], options.width, generator=generator), dim=-1)
        .to(options.device)
        .requires_grad_()
        for _ in range(2)
    )
    logit_scale = torch.tensor(2.659, device=options.device, requires_grad=True)
    loss = {"ours": ours, "open_clip": open_clip_loss}[options.measure](options)

    def once() -> None:
        for leaf in (image, text, logit_scale):
            leaf.grad = None
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            value = loss(image, text, logit_scale)
        value.backward()
        if options.device == "cuda":
            torch.cuda.synchronize()

    with PeakMemory(options.device) as memory:
        once()
    if options.device == "cuda":  # the first call also compiled
        with PeakMemory(options.device) as memory:
            once()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": memory.peak}


def ours(options: argparse.Namespace) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return this package's loss."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from clip_train.distributed.world import World
    from clip_train.loss.clip import ClipLoss
    from clip_train.types import Features

    loss_fn = ClipLoss(world=World(device=torch.device(options.device)))
    return lambda image, text, logit_scale: loss_fn(Features(image, text, logit_scale, None))["contrastive_loss"]


def open_clip_loss(options: argparse.Namespace) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return open_clip's loss with its best flags."""
    from open_clip.loss import ClipLoss

    loss_fn = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    return lambda image, text, logit_scale: loss_fn(image, text, logit_scale.exp())


class PeakMemory:
    """Bytes at the peak above those at the start: allocated on CUDA, resident on a CPU (sampled every millisecond)."""

    def __init__(self, device: str) -> None:
        self._cuda, self.peak = device == "cuda", 0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._start, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated() - self._start
            return
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, resident() - self._start)


def resident() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def summary(pairs: int, rounds: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return medians of both sides and of the per-round ratios, theirs over ours."""
    row: dict[str, float] = {"pairs": pairs}
    for side, results in rounds.items():
        if results:
            row[f"{side}_seconds"] = statistics.median(r["seconds"] for r in results)
            row[f"{side}_gib"] = statistics.median(r["bytes"] for r in results) / GIB
    if rounds["open_clip"]:
        for name in ("seconds", "bytes"):
            ratios = [b[name] / a[name] for a, b in zip(rounds["ours"], rounds["open_clip"], strict=True)]
            row[f"{name}_ratio"] = statistics.median(ratios)
            row[f"{name}_ratio_lowest"], row[f"{name}_ratio_highest"] = min(ratios), max(ratios)
    return row


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return what the numbers depend on."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "device": device, **{k: str(v) for k, v in vars(options).items()}}


if __name__ == "__main__":
    main()
