"""Stop a run between two steps, on all ranks at the same one: after a signal or when its time is up."""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from types import FrameType


class StopReason(IntEnum):
    """Why a run should stop, by rising urgency."""

    none = 0
    time_limit = 1
    interrupted = 2
    preempted = 3


_SIGNALS = {
    signal.SIGINT: StopReason.interrupted,
    signal.SIGTERM: StopReason.preempted,
    signal.SIGUSR1: StopReason.preempted,
    signal.SIGHUP: StopReason.preempted,
}


class StopRequest:
    """Remembers that this process was asked to stop. A context manager: signals have their old meaning after it.

    The first signal lets the trainer finish its step and save; a second one leaves at once with exit code 128 + number.
    """

    def __init__(self, *, max_hours: float | None) -> None:
        self.reason = StopReason.none
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self.former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wanted(self) -> StopReason:
        """Return why this process should stop. The ranks then agree on the most urgent reason of any."""
        if time.monotonic() >= self.deadline:
            self.reason = max(self.reason, StopReason.time_limit)
        return self.reason

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason >= StopReason.interrupted:
            os._exit(128 + number)
        self.reason = _SIGNALS[signal.Signals(number)]
