"""Collect and show the numbers of a run, and hand them to its sinks.

Values stay on the device until a log step; then one gather and one copy bring them to the host.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from clip_train.distributed.collectives import all_gather
from clip_train.metrics.hardware import peak_memory_gib
from clip_train.metrics.panel import Panel
from clip_train.metrics.sinks import Sinks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from clip_train.distributed.world import World
    from clip_train.metrics.config import LoggingConfig


class Metrics:
    """The sinks of one run. Every rank makes one and calls `add` and `log`; only rank 0 writes.

    Args:
        run_dir: folder that gets `metrics.jsonl`.
        world: the ranks.
        config: `logging.*`.
        name: run name, shown and given to wandb.
        total_steps: length of the run.
        global_batch_size: pairs per step, for rates.
        loss_of_guessing: what the loss is compared with.
        start_step: step that the run continues from; later rows of an earlier attempt are dropped.
        evaluate_again: drop what an earlier attempt wrote of the evaluations at that step, too.
        settings: the resolved config, for wandb.
        peak_flops: FLOP per second that a rank's device can do, None where that is not known.
    """

    def __init__(
        self, run_dir: Path, *, world: World, config: LoggingConfig, name: str, total_steps: int,
        global_batch_size: int, loss_of_guessing: float, start_step: int, settings: dict[str, Any],
        evaluate_again: bool = False, peak_flops: float | None = None,
    ) -> None:  # fmt: skip
        self.world = world
        self.global_batch_size, self.loss_of_guessing = global_batch_size, loss_of_guessing
        self.sums: dict[str, Tensor] = {}
        self.num_added = 0
        self.seconds_waiting = 0.0
        self.flops = 0.0
        self.peak_flops = peak_flops
        self.window_start = time.monotonic()
        self.panel = Panel(name=name, total_steps=total_steps, shown=world.is_main)
        self.sinks: Sinks | None = None
        if world.is_main:
            self.sinks = Sinks(
                run_dir, config=config, run_name=name, start_step=start_step, evaluate_again=evaluate_again,
                settings=settings,
            )  # fmt: skip

    def add(self, values: dict[str, Tensor], *, seconds_waiting: float, flops: float) -> None:
        """Add one step's device values (means over this rank's share) without waiting for the device.

        flops: useful FLOP of this rank's pairs in this step.
        """
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_added += 1
        self.seconds_waiting += seconds_waiting
        self.flops += flops

    def log(self, *, step: int, samples_seen: int, extra: dict[str, float]) -> dict[str, float]:
        """Average what was added since the last call over steps and ranks, write it and show it. Every rank calls."""
        names = sorted(self.sums)
        device = self.world.device
        stalled = self.world.stalls.take()
        on_host = torch.tensor([self.seconds_waiting, stalled, self.flops, peak_memory_gib(device)], device=device)
        packed = torch.cat([torch.stack([self.sums[n] for n in names]), on_host])
        ranks = all_gather(packed[None], world=self.world).cpu()  # [ranks, values]
        *means, waiting, stalled, flops, _ = ranks.mean(0).tolist()
        seconds = time.monotonic() - self.window_start
        row = {f"train/{n}": value / self.num_added for n, value in zip(names, means, strict=True)}
        row |= {
            "train/loss_of_guessing": self.loss_of_guessing,
            "perf/samples_per_second": self.num_added * self.global_batch_size / seconds,
            "perf/step_seconds": seconds / self.num_added,
            "perf/data_wait": waiting / seconds,
            "perf/exposed_communication": stalled / seconds,
            "perf/memory_gib": ranks[:, -1].max().item(),
            **({} if self.peak_flops is None else {"perf/mfu": flops / seconds / self.peak_flops}),
            **extra,
        }
        self.sums, self.num_added, self.seconds_waiting, self.flops = {}, 0, 0.0, 0.0
        self.write(row, step=step, samples_seen=samples_seen)
        self.panel.step(step, row)
        self.window_start = time.monotonic()
        return row

    def write(self, row: dict[str, float], *, step: int, samples_seen: int) -> None:
        """Append one row to every sink. Only rank 0 writes."""
        if self.sinks is not None:
            self.sinks.write(row, step=step, samples_seen=samples_seen)

    def rewind(self, step: int) -> None:
        """Forget what was added, and the rows after `step`: those steps are taken again."""
        self.sums, self.num_added, self.seconds_waiting, self.flops = {}, 0, 0.0, 0.0
        self.window_start = time.monotonic()
        if self.sinks is not None:
            self.sinks.rewind(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done within, such as an evaluation, out of the rates."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.window_start += time.monotonic() - began

    def close(self) -> None:
        """Flush and close every sink."""
        self.panel.close()
        if self.sinks is not None:
            self.sinks.close()
