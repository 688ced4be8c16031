"""What is compared: runs, single checkpoints of runs, or folders of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_train.checkpoint.retention import is_checkpoint_name, step_of
from clip_train.config import flat_values, read_yaml
from clip_train.errors import UserError
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.results import EVALUATION_FOLDER, Result, result_files, results_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model with its results."""

    name: str
    """Short, and different from the others'."""
    path: Path
    config: Mapping[str, Any]
    """Of the run by key; empty for a folder of results."""
    rows: Sequence[Mapping[str, Any]]
    """Of `metrics.jsonl`."""
    results: Mapping[str, Sequence[Result]]
    """By evaluation, the one to prefer first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One recipe: a model, or several that were trained alike with other seeds."""

    name: str
    sources: Sequence[Source]


def open_sides(given: Sequence[str]) -> list[Side]:
    """Open what is to be compared, with short names that tell the sides apart.

    Args:
        given: a path each, or several with commas between: the seeds of one recipe.

    Raises:
        UserError: there are fewer than two, one is given twice, or one is neither a run, a checkpoint of a run nor a
            folder of results.
    """
    sides = [[Path(path).expanduser() for path in _paths(side)] for side in given]
    paths = [path for side in sides for path in side]
    if len(sides) < 2 or not all(sides):
        raise UserError("compare needs two runs at least")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("compare needs different runs: one is given twice")
    short = len({path.name for path in paths}) == len(paths) and all(path.name for path in paths)
    opened = [[_open(path, name=path.name if short else str(path)) for path in side] for side in sides]
    return [Side(name=", ".join(source.name for source in side), sources=side) for side in opened]


def choose_results(sources: Sequence[Source], *, evaluation: str) -> list[Result]:
    """Return each source's result of an evaluation that all have, of the same kind if there is one.

    Results of `clip-train evaluate` are preferred, then those of training.
    """
    for later in (True, False):
        chosen = [next((r for r in s.results[evaluation] if r.later is later), None) for s in sources]
        if all(chosen):
            return [result for result in chosen if result is not None]
    return [source.results[evaluation][0] for source in sources]


def _paths(side: str) -> list[str]:
    """A folder may have a comma in its name."""
    return [side] if Path(side).expanduser().is_dir() else [path for path in side.split(",") if path]


def _open(path: Path, *, name: str) -> Source:
    run_dir, step = path, None
    if is_checkpoint_name(path.name) and path.parent.name == "checkpoints":
        run_dir, step = path.parent.parent, step_of(path)
    config = run_dir / "config.yaml"
    if config.is_file():
        values = flat_values(read_yaml(config))
        results = results_in(run_dir / EVALUATION_FOLDER, step=step)
        return Source(name=name, path=path, config=values, rows=read_metrics(run_dir), results=results)
    files = result_files(path)
    if not files:
        raise UserError(f"{path} is neither a run directory, a checkpoint of a run nor a folder of results (NAME.json)")
    results = {file.stem: [Result(path=file, step=None, later=True)] for file in files}
    return Source(name=name, path=path, config={}, rows=[], results=results)
