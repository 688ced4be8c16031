"""The commands of `clip-train runs`."""

from __future__ import annotations

import difflib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from clip_train.attempts import attempts_so_far
from clip_train.checkpoint.lock import RunLock
from clip_train.checkpoint.retention import list_checkpoints, step_of
from clip_train.config_keys import known_keys
from clip_train.errors import ClipTrainError, UserError
from clip_train.evaluation.table import print_table
from clip_train.health.events import read_events
from clip_train.metrics.panel import duration
from clip_train.schema import TrainConfig
from clip_train.tools.report import SUMMARY_KEYS
from clip_train.tools.runs.summary import OWN_KEYS, Status, Summary, find_runs, summarise
from clip_train.tools.runs.where import parse_where

_STYLES = {Status.running: "bold cyan", Status.finished: "green", Status.stopped: "", Status.failed: "bold red"}


def list_runs(folder: Path, *, where: str | None, as_json: bool) -> int:
    """Print the runs below a folder that fulfil a condition; return 3 if one could not be read, else 0.

    Raises:
        UserError: the folder is not there, or the condition cannot be read or names what no run has.
    """
    condition = parse_where(where) if where is not None else None
    found, damaged = [], []
    for path in find_runs(folder):
        try:
            found.append(summarise(path))
        except ClipTrainError as error:
            damaged.append(str(error))
    if condition is not None:
        if not damaged:  # one that cannot be read may have the key
            _require_known(condition.keys, found, where=where or "")
        found = [run for run in found if condition.holds(run.values)]
    if as_json:
        print(json.dumps([run.to_json() for run in found], indent=2))
    elif found:
        print_table(_table(found, folder=folder))
    else:
        print(f"no runs below {folder}" + (f" with {where}" if where else ""))
    for message in damaged:
        print(f"error: {message}", file=sys.stderr)
    return 3 if damaged else 0


def show_run(path: Path) -> None:
    """Print how one run stands, what it was trained with, its attempts, checkpoints and newest scores.

    Raises:
        UserError: it is not the directory of a run.
        IntegrityError: one of its small files is damaged.
    """
    run = summarise(path)
    print(f"{path}: {run.status.value}{f' ({run.reason})' if run.reason else ''}")
    facts = [("step", _progress(run)), ("resumes at", _resumable(run)), ("best", _best(run)), ("size", _size(run))]
    if run.seconds_left is not None:
        facts.insert(1, ("ETA", duration(run.seconds_left)))
    attempts = attempts_so_far(path)
    if attempts:
        devices = " + ".join(sorted({f"{attempt.world} x {attempt.device}" for attempt in attempts}))
        hours = sum(attempt.device_hours for attempt in attempts)
        facts.append(
            ("attempts", f"{len(attempts)} on {devices}, {hours:,.2f} device hours, since {attempts[0].start}")
        )
    steps = [f"{step_of(checkpoint):,}" for checkpoint in reversed(list_checkpoints(path))]
    facts.append(("checkpoints", ", ".join(steps) or "none"))
    events = [event.get("kind", "") for event in read_events(path)]
    if events:
        facts.append(("events", ", ".join(f"{events.count(kind)} {kind}" for kind in dict.fromkeys(events))))
    facts += [(key, str(run.values[key])) for key in SUMMARY_KEYS if run.values.get(key) is not None]
    scores = [
        (name, value)
        for name, value in run.values.items()
        if "/" in name and name.partition("/")[0] not in ("train", "perf", "data", "health")
    ]
    facts += [(name, _value(name, value)) for name, value in scores]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"  {name.ljust(width)}  {value}")


def remove_runs(paths: Sequence[Path], *, yes: bool) -> int:
    """Delete runs with all their files after asking; return 1 if the answer was no, else 0.

    Raises:
        UserError: one is no run directory, or a process may be training in it; none is deleted then. Or one cannot be
            deleted.
    """
    runs = []
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a link: name the run directory itself")
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = summarise(path)
        if run.status is Status.running:
            raise UserError(f"{path} is in use by {run.reason}: stop it first")
        runs.append(run)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nobody to ask here: --yes deletes without a question")
        for run in runs:
            print(f"{run.path}: {run.status.value}, {_progress(run)}, {_size(run)}")
        answer = input(f"delete {len(runs)} run{'s' if len(runs) > 1 else ''} with all checkpoints? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was deleted")
            return 1
    for run in runs:
        RunLock(run.path)  # a command that starts it at this moment is refused
        try:
            shutil.rmtree(run.path)
        except OSError as error:
            raise UserError(f"{run.path} cannot be deleted, it is there in part: {error}") from error
        print(f"deleted {run.path} ({_size(run)})")
    return 0


def _table(runs: Sequence[Summary], *, folder: Path) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("status", overflow="fold")
    for heading in ("step", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("best", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("resumes at", justify="right", no_wrap=True)
    for run in runs:
        name = run.path.relative_to(folder).as_posix() if run.path != folder else run.path.name
        status = Text(run.status.value, style=_STYLES[run.status])
        if run.reason:
            status.append(f": {run.reason}", style="")
        left = duration(run.seconds_left) if run.seconds_left is not None else ""
        table.add_row(name, status, _progress(run), left, _best(run), _size(run), _resumable(run))
    return table


def _progress(run: Summary) -> str:
    return f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else "")


def _best(run: Summary) -> str:
    if run.best is None:
        return "–"
    return f"{run.best.metric} {_value(run.best.metric, run.best.value)} at {run.best.step:,}"


def _value(metric: str, value: float) -> str:
    """Return a loss as it is, and everything else, a share, in percent."""
    return f"{value:.4f}" if metric.endswith("/loss") else f"{100 * value:.2f} %"


def _size(run: Summary) -> str:
    size = float(run.size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _resumable(run: Summary) -> str:
    return "–" if run.resumable_step is None else f"{run.resumable_step:,}"


def _require_known(keys: frozenset[str], runs: Sequence[Summary], *, where: str) -> None:
    """A misspelt key must not look like a list without such runs."""
    known = {*(key for run in runs for key in run.values), *known_keys(TrainConfig), *OWN_KEYS}
    for key in sorted(keys - known):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]!r}?" if near else "; keys are those of configs and metrics, status and step"
        raise UserError(f"--where {where!r}: no run has {key!r}{hint}")
