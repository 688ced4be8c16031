"""How a run stands, from the files in its directory: nothing is loaded and nothing is locked."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from clip_train.attempts import read_attempts
from clip_train.checkpoint.best import read_best
from clip_train.checkpoint.lock import live_owner
from clip_train.checkpoint.retention import list_checkpoints, step_of
from clip_train.config import flat_values, read_yaml
from clip_train.errors import ClipTrainError, IntegrityError, Preempted, UserError
from clip_train.exit_record import read_exit
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.report_evaluations import HEADLINE_METRICS

OWN_KEYS = ("status", "step", "path", "size_gib")
"""What every run has besides its config and its metrics."""
ROWS_FOR_ETA = 200
_KEYS_OF_A_TRAINING = {"global_batch_size", "run_dir"}
_STOPPED = "stopped: "  # how the reason of a run begins that saved and left before its end


class Status(StrEnum):
    """What became of a run."""

    running = "running"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


class Best(NamedTuple):
    """A run's best value of the metric that stands for it."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run stands."""

    path: Path
    status: Status
    reason: str
    """Where it runs, why it stopped or failed; empty for a finished one."""
    step: int
    total_steps: int | None
    """None where the length is in epochs and no checkpoint tells the size of the data."""
    seconds_left: float | None
    """Of a running one that has logged."""
    best: Best | None
    size_bytes: int
    resumable_step: int | None
    """Of the newest checkpoint of a run that has not finished; None where nothing can be continued."""
    values: Mapping[str, Any]
    """Config values and newest metrics by key, with `OWN_KEYS`."""

    def to_json(self) -> dict[str, Any]:
        """Return what `runs ls --json` prints of it."""
        return {
            "path": str(self.path), "status": self.status.value, "reason": self.reason, "step": self.step,
            "total_steps": self.total_steps, "seconds_left": self.seconds_left,
            "best": self.best._asdict() if self.best else None, "size_bytes": self.size_bytes,
            "resumable_step": self.resumable_step,
        }  # fmt: skip


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories in and below a folder, in order of their paths. A run holds no further runs.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    for parent, folders, files in os.walk(folder):
        if "config.yaml" in files and is_run(Path(parent)):
            folders.clear()
            yield Path(parent)
        folders.sort()


def is_run(folder: Path) -> bool:
    """Return whether a folder's `config.yaml` is that of a training, be it damaged: many programs write such a file."""
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    found = {line.partition(":")[0] for line in lines}
    return found >= _KEYS_OF_A_TRAINING or (folder / "metrics.jsonl").exists()


def summarise(run_dir: Path) -> Summary:
    """Return how a run stands.

    Raises:
        UserError: `run_dir` is not the directory of a run.
        IntegrityError: one of its small files is damaged.
    """
    if not is_run(run_dir):
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml of a training")
    config = flat_values(read_yaml(run_dir / "config.yaml"))
    rows = read_metrics(run_dir)
    checkpoints = list_checkpoints(run_dir)
    step = max([row["step"] for row in rows[-1:]] + [step_of(path) for path in checkpoints[:1]], default=0)
    try:
        total_steps = _total_steps(config, checkpoints=checkpoints)
    except (TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{run_dir}/config.yaml: its length is no number: {error}") from error
    status, reason = _status(run_dir, step=step, total_steps=total_steps)
    size_bytes = _size(run_dir)
    newest = {name: value for row in rows for name, value in row.items() if value is not None}
    own = dict(zip(OWN_KEYS, (status.value, step, str(run_dir), size_bytes / 2**30), strict=True))
    return Summary(
        path=run_dir,
        status=status,
        reason=reason,
        step=step,
        total_steps=total_steps,
        seconds_left=_seconds_left(rows, steps=total_steps - step) if total_steps and status == "running" else None,
        best=_best(run_dir, rows),
        size_bytes=size_bytes,
        resumable_step=step_of(checkpoints[0]) if checkpoints and status is not Status.finished else None,
        values={**config, **newest, **own},
    )


def _status(run_dir: Path, *, step: int, total_steps: int | None) -> tuple[Status, str]:
    if owner := live_owner(run_dir):
        return Status.running, f"process {owner.pid} on {owner.host}"
    record = read_exit(run_dir)
    if record is not None:
        if record.code == 0 and not record.reason.startswith(_STOPPED):
            return Status.finished, ""
        if record.code in (0, Preempted.exit_code):
            return Status.stopped, record.reason.removeprefix(_STOPPED)
        return Status.failed, f"exit code {record.code}: {record.reason}"
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].code is None:
        return Status.failed, "killed: no record of its end"
    if total_steps is not None and step >= total_steps:
        return Status.finished, ""
    return Status.stopped, "no record of its end"


def _total_steps(config: Mapping[str, Any], *, checkpoints: list[Path]) -> int | None:
    if config.get("steps") is not None:
        return int(config["steps"])
    samples = config.get("samples")
    if samples is None and config.get("epochs") is not None and checkpoints:
        try:  # the size of the data is in no config: it was counted
            state = json.loads((checkpoints[0] / "train_state.json").read_text(encoding="utf-8"))
            sources = state["progress"]["data"]["segments"][-1]["sources"]
            samples = config["epochs"] * sum(source["epoch_samples"] for source in sources)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return None  # a checkpoint that is damaged, or of a stream that cannot be counted
    return None if samples is None else max(1, round(samples / config["global_batch_size"]))


def _seconds_left(rows: list[dict[str, Any]], *, steps: int) -> float | None:
    seconds = [row["perf/step_seconds"] for row in rows if row.get("perf/step_seconds") is not None][-ROWS_FOR_ETA:]
    return steps * statistics.median(seconds) if seconds else None


def _best(run_dir: Path, rows: list[dict[str, Any]]) -> Best | None:
    """Return what `checkpoint.best` says, else the best value of the first evaluation's headline metric."""
    try:
        if chosen := read_best(run_dir):
            return Best(chosen.metric.removeprefix("-"), chosen.value, chosen.step)
    except ClipTrainError:
        pass  # a damaged note costs the column, not the list
    names = {name for row in rows for name, value in row.items() if value is not None}
    for metric in HEADLINE_METRICS:
        for name in sorted(one for one in names if one.partition("/")[2] == metric):
            found = [Best(name, row[name], row["step"]) for row in rows if row.get(name) is not None]
            return max(found, key=lambda best: best.value)
    return None


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder, those with several names counted once."""
    found = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                entry = os.lstat(Path(parent) / name)
            except FileNotFoundError:
                continue  # a run under way deletes checkpoints
            found[entry.st_dev, entry.st_ino] = entry.st_size
    return sum(found.values())
