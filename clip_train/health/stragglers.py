"""Which rank is slower than the others: its own time of a step, for loading and computing, without waits for others."""

from __future__ import annotations

import time
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

import torch

from clip_train.distributed.collectives import all_gather

if TYPE_CHECKING:
    from clip_train.data.delivery import StepExchange
    from clip_train.distributed.world import World

SLOW = 1.5  # times the median, and
MIN_LOSS = 0.05  # of the time of all, that the slow rank costs
PATIENCE_STEPS = 100


class RankTimes(NamedTuple):
    """What one rank needs for a step by itself, in seconds."""

    work: float  # until it first waits for others: the forward passes
    loading: float  # until its batch is there


class Stragglers:
    """Compares the ranks whenever a row is logged. Every rank makes one and calls it alike.

    Args:
        world: the ranks; it knows how long this one works in a step.
        exchange: knows how long this rank waits for its batches.
    """

    def __init__(self, *, world: World, exchange: StepExchange) -> None:
        self._world, self._exchange = world, exchange
        self._seconds_loading = 0.0  # at the last call
        self._step: int | None = None  # of the last call
        self._time = 0.0
        self._slow_since: tuple[int, int] | None = None  # rank and step
        self._warning: str | None = None
        self._warned = False

    def measures(self, step: int) -> dict[str, float]:
        """Return times of the slowest and the median rank since the last call, which the first call only begins.

        It waits for the device.
        """
        work, loading = self._world.stalls.take_work(), self._exchange.seconds_loading
        steps = step - self._step if self._step is not None else 0
        own = [work / max(1, steps), (loading - self._seconds_loading) / max(1, steps)]
        now = time.monotonic()
        seconds_per_step = (now - self._time) / max(1, steps)
        self._step, self._seconds_loading, self._time = step, loading, now
        if self._world.size == 1 or steps <= 0:
            return {}
        gathered = all_gather(torch.tensor([own]), world=self._world, group=self._world.host_group)
        ranks = [RankTimes(*row) for row in gathered.tolist()]
        self._judge(ranks, step=step, seconds_per_step=seconds_per_step)
        totals = [sum(times) for times in ranks]
        return {
            "perf/slowest_rank": max(totals) / max(median_low(totals), 1e-9),
            "perf/work_seconds_max": max(times.work for times in ranks),
            "perf/work_seconds_median": median_low(times.work for times in ranks),
            "perf/loading_seconds_max": max(times.loading for times in ranks),
            "perf/loading_seconds_median": median_low(times.loading for times in ranks),
        }

    def take_warning(self) -> str | None:
        """Return what is to be said of a slow rank, once."""
        warning, self._warning = self._warning, None
        return warning

    def _judge(self, ranks: list[RankTimes], *, step: int, seconds_per_step: float) -> None:
        totals = [sum(times) for times in ranks]
        slowest, usual = max(range(len(ranks)), key=totals.__getitem__), median_low(totals)
        if totals[slowest] <= SLOW * usual or totals[slowest] - usual < MIN_LOSS * seconds_per_step:
            self._slow_since = None
        elif self._slow_since is None or self._slow_since[0] != slowest:
            self._slow_since = (slowest, step)
        elif step - self._slow_since[1] >= PATIENCE_STEPS and not self._warned:
            self._warned = True
            work, loading = ranks[slowest]
            self._warning = (
                f"rank {slowest} is slow: by itself it needs {totals[slowest]:.3g} s for a step ({loading:.3g} s for "
                f"its batch, {work:.3g} s for its forward passes), others {usual:.3g} s, for {PATIENCE_STEPS} steps; "
                "all ranks wait for it"
            )
