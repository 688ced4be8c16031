"""What a sweep makes as large or as small as it can: one metric, read from the runs' `metrics.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clip_train.checkpoint.config import EMA_SUFFIX
from clip_train.errors import TrainingFailed, UserError
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.grid import TRAINING
from clip_train.tools.report_evaluations import read_evaluations

if TYPE_CHECKING:
    from clip_train.schema import TrainConfig

Direction = Literal["minimize", "maximize"]
_OF_EVALUATIONS = {"retrieve": "mean_recall@1", "classify": "acc1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One metric and its better direction."""

    metric: str
    """As in `metrics.jsonl`."""
    smaller_is_better: bool

    @property
    def direction(self) -> Direction:
        """As Optuna calls it."""
        return "minimize" if self.smaller_is_better else "maximize"

    def history(self, run_dir: Path) -> list[tuple[int, float | None]]:
        """Return (step, value) wherever a run measured the metric; a value that was not finite is None."""
        rows = read_metrics(run_dir)
        return [(row["step"], row[self.metric]) for row in rows if self.metric in row]

    def final(self, run_dir: Path) -> float:
        """Return what the metric was at the end of a finished run.

        Raises:
            TrainingFailed: its model had collapsed, or the metric was not finite.
            UserError: the run gave other metrics only, as every other one would.
        """
        values = [value for _, value in self.history(run_dir)]
        room = self.metric.partition("/")[0]
        if not values:
            for evaluation in read_evaluations(run_dir / "evaluation"):
                if evaluation.name == room and evaluation.collapsed:
                    raise TrainingFailed(f"collapsed on {room}: {evaluation.collapsed}")
            measured = {name for row in read_metrics(run_dir) for name in row if name.startswith(f"{room}/")}
            listed = ", ".join(sorted(measured)) or f"no {room}/…"
            raise UserError(f"{run_dir} measured no {self.metric} for sweep.metric; there are {listed}")
        if values[-1] is None:
            raise TrainingFailed(f"its {self.metric} is not finite")
        return values[-1]


def objective_of(config: TrainConfig, *, metric: str | None) -> Objective:
    """Return what `sweep.metric` asks of runs with this config, and what null means for them.

    Raises:
        UserError: the runs have no evaluation that gives such a metric.
    """
    given = metric or config.checkpoint.best
    if given is None:
        scores = ((name, _OF_EVALUATIONS.get(one.name)) for name, one in config.evaluation.items())
        given = next((f"{name}/{score}" for name, score in scores if score), "-train/loss")
    name = given.removeprefix("-")
    room = name.partition("/")[0]
    averaged = [f"{one}{EMA_SUFFIX}" for one in config.evaluation if config.optim.ema_decay is not None]
    known = [*config.evaluation, *averaged, *TRAINING]
    if "/" not in name or room not in known:
        listed = ", ".join(f"{one}/…" for one in known)
        raise UserError(f"sweep.metric={given} must be a metric of these runs; there are {listed}")
    return Objective(metric=name, smaller_is_better=given.startswith("-"))


def require_intermediate(objective: Objective, *, config: TrainConfig, pruner: str) -> None:
    """Check that trials can be judged before their end.

    Raises:
        UserError: the metric is measured at the end only, or the length of a run is not known beforehand.
    """
    room = objective.metric.partition("/")[0]
    evaluation = config.evaluation.get(room) or config.evaluation.get(room.removesuffix(EMA_SUFFIX))
    if evaluation is not None and not evaluation.every:
        raise UserError(
            f"sweep.pruner={pruner} judges by {objective.metric} during training: give evaluation.{room}.every= "
            "a number of steps"
        )
    if config.epochs is not None:
        raise UserError(f"sweep.pruner={pruner} needs steps= or samples=, not epochs=, to know how far a trial is")
