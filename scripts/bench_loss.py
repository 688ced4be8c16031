"""Time and memory of the contrastive loss, forward and backward, against open_clip 3.3.0's `ClipLoss`.

    python scripts/bench_loss.py --peer-python PATH --json loss.json     # batch 8,192, width 512, 2 cores
    python scripts/bench_loss.py --batch 65536 --rounds 0                # ours alone, the first call
    python scripts/bench_loss.py --device cuda --precision bf16 --batch 8192 32768 131072 --peer-limit 32768

One rank. Memory is the peak of one call in a fresh process above what the features take: allocated on CUDA, after a
first call that compiles, resident on a CPU. Seconds are medians over interleaved rounds. Both sides run under autocast
where --precision says so, as they do in training; open_clip's has its best flags. With --rounds 0 the call whose memory
is measured is also the one that is timed.

Aims: on 2 CPU cores at 8,192 a fifth of the memory and 1.3 times the speed, 65,536 in under 2 GiB; on an H200 at 32,768
a 70th of the memory and twice the speed, 131,072 in at most 0.8 GB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench
import torch
from bench_sides import autocast_of
from torch import Tensor

MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image features, text features [B, D] and logit_scale


def main() -> None:
    """Measure as the command line says."""
    if "--worker" in sys.argv:
        bench.serve(build)
        return
    options = parse()
    started = bench.environment(options)
    rows = [
        compare(options, batch=batch, precision=precision) for precision in options.precision for batch in options.batch
    ]
    bench.print_table([shown(row) for row in rows])
    bench.finish(options, started=started, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[8192], help="pairs (default 8192)")
    parser.add_argument("--width", type=int, default=512, help="embedding width (default 512)")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, help="timed calls per side and round (default 1; on CUDA 20)")
    parser.add_argument("--peer-limit", type=int, default=16384, help="largest batch for open_clip (default 16384)")
    options = parser.parse_args()
    options.repeats = options.repeats or (20 if options.device == "cuda" else 1)
    return options


def compare(options: argparse.Namespace, *, batch: int, precision: str) -> dict[str, Any]:
    """Return a row: bytes and seconds of both sides at one batch size."""
    settings = {
        "batch": batch, "precision": precision, "width": options.width, "device": options.device,
        "threads": options.threads,
    }  # fmt: skip
    sides = {"ours": (settings | {"side": "ours"}, sys.executable)}
    if batch <= options.peer_limit and bench.peer_version(options.peer_python):
        sides["open_clip"] = (settings | {"side": "open_clip"}, options.peer_python)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(bench.Worker(__file__, python=python, settings=chosen))
            for name, (chosen, python) in sides.items()
        }
        first = {name: worker.ask({"measure": "bytes"}) for name, worker in workers.items()}
        peak = {name: call["bytes"] for name, call in first.items()}

        def side(worker: bench.Worker) -> Callable[[], float]:
            return lambda: worker.ask({"measure": "seconds", "calls": options.repeats})["seconds"] / options.repeats

        seconds = bench.interleaved({n: side(w) for n, w in workers.items()}, rounds=options.rounds)
        if options.rounds == 0:
            seconds = {name: [call["seconds"]] for name, call in first.items()}
    row = {"batch": batch, "precision": precision, "bytes": peak, "seconds": seconds}
    if "open_clip" in sides:
        row["memory_ratio"] = peak["open_clip"] / peak["ours"]
        row["speed_ratio"] = bench.ratio(seconds["open_clip"], seconds["ours"])
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people."""
    cells: dict[str, Any] = {"batch": row["batch"], "precision": row["precision"]}
    for name in ("ours", "open_clip"):
        measured = name in row["seconds"]
        cells[f"{name}_seconds"] = statistics.median(row["seconds"][name]) if measured else "-"
        cells[f"{name}_mib"] = f"{row['bytes'][name] / MIB:.0f}" if measured else "-"
    cells["memory_ratio"] = row.get("memory_ratio", "-")
    cells["speed_ratio"] = bench.shown_ratio(row.get("speed_ratio"))
    return cells


def build(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build one side's loss and its inputs in a worker."""
    device = settings["device"]
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(settings["batch"], settings["width"], generator=generator), dim=-1)
        .to(device)
        .requires_grad_()
        for _ in range(2)
    )
    logit_scale = torch.tensor(2.659, device=device, requires_grad=True)
    loss = {"ours": our_loss, "open_clip": open_clip_loss}[settings["side"]](settings)

    def once() -> None:
        for leaf in (image, text, logit_scale):
            leaf.grad = None
        with autocast_of(settings):
            value = loss(image, text, logit_scale)
        value.backward()

    def calls(number: int) -> None:
        for _ in range(number):
            once()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["measure"] == "seconds":
            return {"seconds": bench.timed(lambda: calls(request["calls"]), device=device)}
        if device == "cuda":  # the first call compiles
            once()
        with PeakMemory(device) as memory:
            seconds = bench.timed(once, device=device)
        return {"bytes": memory.peak, "seconds": seconds}

    return answer


def our_loss(settings: dict[str, Any]) -> Loss:
    """Return this package's loss."""
    from clip_train.distributed.world import World
    from clip_train.loss.clip import ClipLoss
    from clip_train.types import Features

    loss_fn = ClipLoss(world=World(device=torch.device(settings["device"])))
    return lambda image, text, logit_scale: loss_fn(Features(image, text, logit_scale, None))["contrastive_loss"]


def open_clip_loss(settings: dict[str, Any]) -> Loss:
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
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._start
            return
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, resident() - self._start)


def resident() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


if __name__ == "__main__":
    main()
