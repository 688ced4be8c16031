"""Stop a run between two steps, on all ranks at the same one: after a signal or when its time is up."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from enum import IntEnum
from types import FrameType

from clip_train.errors import Preempted, Stopped

_BEFORE_TRAINING = "before training began; the same command starts there"
STOP_SECONDS = 600.0  # a process that was asked to stop leaves after this long even if it could not save
SAME_REQUEST_SECONDS = 1.0  # srun and torchrun both pass on one request: repeats within this time are no second one
LAUNCHER_VARIABLE = "CLIP_TRAIN_LAUNCHER"
"""Set by a command of ours for a run that it starts: its process id."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
STOP_SIGNALS = frozenset(_SIGNALS)


class StopRequest:
    """Remembers that this process was asked to stop. A context manager: signals have their old meaning after it.

    The first signal lets the trainer finish its step and save; a second one leaves at once with exit code 128 + number,
    also while the trainer waits in a collective that never ends.
    """

    def __init__(self, *, max_hours: float | None) -> None:
        self.reason = StopReason.none
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._former: dict[int, object] = {}
        self._former_wakeup = -1
        self._arrivals = self._arrived = -1
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._on_signal)
        # Python runs a handler only between two bytecodes of the main thread; the byte comes in any case.
        self._arrivals, self._arrived = os.pipe()
        os.set_blocking(self._arrived, False)
        self._former_wakeup = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._former_wakeup)
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._arrived)
        self._listener.join()
        os.close(self._arrivals)

    def wanted(self) -> StopReason:
        """Return why this process should stop. The ranks then agree on the most urgent reason of any."""
        if time.monotonic() >= self.deadline:
            self.reason = max(self.reason, StopReason.time_limit)
        return self.reason

    def leave_if_asked(self) -> None:
        """End the run here if this process should stop: for what comes before there is anything to save.

        Raises:
            Stopped: after Ctrl-C, or when its time is up.
            Preempted: after another signal.
        """
        reason = self.wanted()
        if reason is StopReason.preempted:
            raise Preempted(f"asked to stop {_BEFORE_TRAINING}")
        if reason:
            raise Stopped(f"stopped: {reason.name.replace('_', ' ')} {_BEFORE_TRAINING}")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.reason = max(self.reason, _SIGNALS[signal.Signals(number)])

    def _listen(self) -> None:
        """Leave at a second signal, or when the first one has not led to an end in time."""
        first, since, parent = 0, 0.0, os.getppid()
        while True:
            patience = None if not first else max(0.0, since + STOP_SECONDS - time.monotonic())
            if not select.select([self._arrivals], [], [], patience)[0]:
                _leave(first, f"no end within {STOP_SECONDS:.0f} s of the request to stop")
            numbers = os.read(self._arrivals, 64)
            if not numbers:
                return
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                # A warning ahead of time (SIGUSR1) or a launcher's death are followed by a SIGTERM that nobody sent
                # out of impatience.
                escalated = first == signal.SIGUSR1 and number == signal.SIGTERM
                orphaned = os.getppid() != parent
                if first and not escalated and not orphaned and time.monotonic() - since > SAME_REQUEST_SECONDS:
                    _leave(number, "asked to stop for the second time")
                if not first or escalated:
                    first, since = number, time.monotonic()
                parent = os.getppid()


def follow_launcher() -> None:
    """Have the system send SIGTERM to this rank when what started it dies, on Linux: it would train on unseen."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _leave(number: int, why: str) -> None:
    os.write(2, f"{why} ({signal.Signals(number).name}): leaving without saving\n".encode())
    os._exit(128 + number)
