"""A run directory for notebooks: what it was trained with, what it measured, and its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

import clip_train
from clip_train.checkpoint.retention import list_checkpoints
from clip_train.config import read_yaml
from clip_train.errors import UserError
from clip_train.evaluation.result import read_result
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.report import write_report

if TYPE_CHECKING:
    import torch

    from clip_train.interop.loaded_model import LoadedModel
    from clip_train.interop.pictures import Preprocess


def newest_run(folder: Path = Path("runs")) -> Path:
    """Return the run in `folder` that saved last.

    Raises:
        UserError: there is none.
    """
    saved = {run: checkpoints[0] for run in folder.glob("*") if (checkpoints := list_checkpoints(run))}
    if not saved:
        raise UserError(f"there is no run below {folder}: name a model")
    return max(saved, key=lambda run: saved[run].stat().st_mtime)


class Run:
    """What a run directory holds. Everything is read when it is asked for, so a run under way gives its newest state.

    Args:
        path: the run directory.

    Raises:
        UserError: `path` is not the directory of a run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path} has no config.yaml: it is not a run directory")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> DictConfig:
        """The config of the run, by attribute (`run.config.optim.lr`) or key; read-only."""
        config = cast("DictConfig", read_yaml(self.path / "config.yaml"))
        OmegaConf.set_readonly(config, True)
        return config

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of `metrics.jsonl` in order of their steps: training and evaluation metrics by name."""
        return read_metrics(self.path) if (self.path / "metrics.jsonl").is_file() else []

    def metric(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps int64 [n], values float64 [n]) of one metric, where it was logged.

        Raises:
            UserError: no row has it.
        """
        rows = [row for row in self.metrics if row.get(name) is not None]
        if not rows:
            known = sorted({key for row in self.metrics for key in row} - {"step", "samples_seen", "time"})
            raise UserError(f"{self.path}: no metric {name!r}; there are {', '.join(known) or 'none yet'}")
        return np.array([int(row["step"]) for row in rows]), np.array([row[name] for row in rows], dtype=np.float64)

    @property
    def evaluations(self) -> dict[str, dict[int | None, dict[str, Any]]]:
        """Results by evaluation and step, in clip-benchmark's format; step None is `clip-train evaluate`.

        Raises:
            IntegrityError: a result file is damaged.
        """
        found: dict[str, dict[int | None, dict[str, Any]]] = {}
        folder = self.path / "evaluation"
        for file in [*sorted(folder.glob("step-*/*.json")), *sorted(folder.glob("*.json"))]:
            if not file.name.endswith(".samples.json"):
                step = None if file.parent == folder else int(file.parent.name.removeprefix("step-"))
                found.setdefault(file.stem, {})[step] = read_result(file)
        return found

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints on disk, newest first; `clip_train.load` takes each."""
        return list_checkpoints(self.path)

    def load(
        self, device: str | torch.device | None = None, *, weights: str = "auto", dtype: torch.dtype | str | None = None
    ) -> tuple[LoadedModel, Preprocess]:
        """Load the model, as `clip_train.load` does with the run's path."""
        return clip_train.load(self.path, device=device, weights=weights, dtype=dtype)

    def report(self) -> Path:
        """Write `report.html` anew and return its path."""
        return write_report(self.path)
