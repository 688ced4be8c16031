"""How a run ended, for whoever decides whether to start it again: `RUN/exit.json`, written by rank 0.

Launchers hide it: torchrun turns every exit code of its ranks into 1, and would restart ranks that ask for a requeue.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from clip_train.files import replace_file

EXIT_NAME = "exit.json"
FINAL_CODES = (0, 2, 3, 85)
"""Finished, user error, damaged data, preempted: starting the ranks again in the same launch changes nothing."""

_LAUNCH_VARIABLES = {
    "torchrun": "TORCHELASTIC_RUN_ID",
    "job": "SLURM_JOB_ID",
    "step": "SLURM_STEP_ID",
    "restart": "SLURM_RESTART_COUNT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """The end of a run's newest attempt."""

    code: int
    reason: str
    step: int | None  # optimizer steps that were done; null if it ended before that was known
    time: str  # UTC, ISO 8601
    launch_id: str

    def write(self, run_dir: Path) -> None:
        """Write `exit.json` in one step that a crash cannot halve."""
        replace_file(run_dir / EXIT_NAME, json.dumps(asdict(self)) + "\n")


def read_exit(run_dir: Path) -> ExitRecord | None:
    """Return how the run ended, None while it runs, if it was killed, or if the file is not one of ours."""
    try:
        return ExitRecord(**json.loads((run_dir / EXIT_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def ended_before(run_dir: Path) -> ExitRecord | None:
    """Return how this launch ended already, if its launcher restarts ranks that are not to be restarted."""
    record = read_exit(run_dir) if restart_count() else None
    return record if record and record.launch_id == launch_id() and record.code in FINAL_CODES else None


def restart_count() -> int:
    """Return how often torchrun has restarted the ranks of this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """Return what is equal for all ranks and restarts of one launch, and differs after a requeue."""
    found = [f"{what}-{os.environ[name]}" for what, name in _LAUNCH_VARIABLES.items() if name in os.environ]
    return " ".join(found) or f"process-{socket.gethostname()}-{os.getpid()}"


def now() -> str:
    """Return the time as the files of a run show it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
