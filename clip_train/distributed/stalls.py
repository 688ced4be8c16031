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
    """Adds up the waits of one process. On CUDA the stream's waits count, taken from events that nobody waits for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, work: Work, *, device: torch.device) -> Work:
        """Return `work` with a `wait` that counts."""
        return _Watched(work, self, device)

    def count(self, exchange: Callable[[], Result], *, device: torch.device) -> Result:
        """Run an exchange that waits by itself, count it and return what it returns."""
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            result = exchange()
            after.record()
            self._events.append((before, after))
            return result
        started = time.monotonic()
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
