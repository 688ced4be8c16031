"""How long a rank stands still for what the others send: communication that nothing hides."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from clip_train.distributed.collectives import Work

Result = TypeVar("Result")


class Stalls:
    """Adds up the waits of one process. On CUDA the stream's waits count, taken from events that nobody waits for.

    Also how long this process works in a step until it first waits for others. All ranks begin a step together, behind
    the gradients of the one before, so this tells a slow rank from those that wait for it; their whole steps take equal
    time. With FSDP ranks wait for each other's parameters before that, unseen: then the slow one does not stand out.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._working = False  # in a step, before its first wait
        self._work_began = 0.0
        self._work_seconds = 0.0
        self._work_start: torch.cuda.Event | None = None
        self._work_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin_step(self, *, device: torch.device) -> None:
        """Tell that this process begins to work on a step."""
        self._working = True
        self._work_began = time.monotonic()
        if device.type == "cuda":
            self._work_start = torch.cuda.Event(enable_timing=True)
            self._work_start.record()

    def take_work(self) -> float:
        """Return the seconds of work before the first waits since the last call. On CUDA it waits for the device."""
        seconds, self._work_seconds = self._work_seconds, 0.0
        events, self._work_events = self._work_events, []
        for before, after in events:
            after.synchronize()
            seconds += before.elapsed_time(after) / 1000
        return seconds

    def watch(self, work: Work, *, device: torch.device) -> Work:
        """Return `work` with a `wait` that counts."""
        return _Watched(work, self, device)

    def count(self, exchange: Callable[[], Result], *, device: torch.device) -> Result:
        """Run an exchange that waits by itself, count it and return what it returns."""
        first, self._working = self._working, False
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            if first and self._work_start is not None:
                self._work_events.append((self._work_start, before))
            result = exchange()
            after.record()
            self._events.append((before, after))
            return result
        started = time.monotonic()
        if first:
            self._work_seconds += started - self._work_began
        result = exchange()
        self._seconds += time.monotonic() - started
        return result

    def take(self) -> float:
        """Return the seconds since the last call. It waits for the device, so call it where that happens anyway."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        for before, after in events:
            after.synchronize()
            seconds += before.elapsed_time(after) / 1000
        return seconds


class _Watched:
    def __init__(self, work: Work, stalls: Stalls, device: torch.device) -> None:
        self._work, self._stalls, self._device = work, stalls, device

    def wait(self) -> Any:
        """Wait, and count it."""
        return self._stalls.count(self._work.wait, device=self._device)
