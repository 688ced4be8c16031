"""One run of a trial: an ordinary `clip-train train` in a folder of its own, and how it ended."""

from __future__ import annotations

import signal
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clip_train.checkpoint.lock import is_held_by_another
from clip_train.distributed.stop import StopReason
from clip_train.errors import Preempted
from clip_train.exit_record import EXIT_NAME, read_exit

if TYPE_CHECKING:
    from clip_train.tools.sweep.devices import Slot
    from clip_train.tools.trials import TrialProcesses

OUTPUT_NAME = "output.log"
"""What the processes of a run print, in its folder."""


class Ended(StrEnum):
    """How a run stands when none of its processes lives: unknown if it was killed or never began."""

    finished = "finished"
    stopped = "stopped"
    failed = "failed"
    unknown = "unknown"


class Outcome(NamedTuple):
    """The end of a run, and why where it failed."""

    ended: Ended
    reason: str = ""


class TrialRun:
    """A run of trial `number` with the `seed`-th of its seeds."""

    def __init__(self, folder: Path, *, number: int, seed: int, arguments: list[str]) -> None:
        self.folder, self.number, self.seed, self.arguments = folder, number, seed, arguments
        self.total_steps: int | None = None  # null where only its data could tell
        self.slot: Slot | None = None
        self.num_judged = 0  # entries of its history that the pruner has seen
        self._process: subprocess.Popen | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether a process that an earlier sweep started still trains in its folder."""
        return self._process is None and is_held_by_another(self.folder)

    def start(self, processes: TrialProcesses, *, slot: Slot) -> None:
        """Start it where it stands: from its newest checkpoint if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / EXIT_NAME).unlink(missing_ok=True)  # what the next end leaves is that of this process
        with (self.folder / OUTPUT_NAME).open("ab") as output:
            self._process = processes.start(self.arguments, environment=slot.environment, output=output)

    def stop(self) -> None:
        """Ask it to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def poll(self) -> Outcome | None:
        """Return how it ended, None while its process lives."""
        if self._process is None or self._process.poll() is None:
            return None
        outcome = outcome_of(self.folder)
        if outcome.ended is not Ended.unknown:
            return outcome
        return Outcome(Ended.unknown, f"{_name_of(self._process.returncode)}: {_last_line(self.folder / OUTPUT_NAME)}")


def outcome_of(folder: Path) -> Outcome:
    """Return how the run in `folder` ended, by its `exit.json`."""
    record = read_exit(folder)
    if record is None:
        return Outcome(Ended.unknown)
    interrupted = f"stopped: {StopReason.interrupted.name}"
    if record.code == Preempted.exit_code or (record.code == 0 and record.reason.startswith(interrupted)):
        return Outcome(Ended.stopped, record.reason)
    return Outcome(Ended.finished) if record.code == 0 else Outcome(Ended.failed, record.reason)


def _name_of(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
