"""The best checkpoint of a run by one metric of its evaluations: `checkpoints/best.json` names it, and it stays."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from clip_train.checkpoint.config import EMA_SUFFIX
from clip_train.checkpoint.retention import checkpoint_path
from clip_train.errors import IntegrityError, UserError
from clip_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BEST_NAME = "best.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What an evaluation said of the weights after a step."""

    step: int
    metric: str  # as in `val/image_retrieval_recall@1`; a leading minus says that smaller is better
    value: float

    @property
    def averaged(self) -> bool:
        """Whether it is the moving average of the weights that was evaluated."""
        return self.metric.split("/")[0].endswith(EMA_SUFFIX)

    @staticmethod
    def of(metrics: Mapping[str, float], *, metric: str, step: int) -> Score | None:
        """Pick a metric out of those of some evaluations; None if its evaluation gave none, as of a collapsed model."""
        value = metrics.get(metric.removeprefix("-"))
        return None if value is None else Score(step=step, metric=metric, value=value)

    def beats(self, other: Score | None) -> bool:
        """Return whether this is better than `other`; anything beats none and another metric's."""
        if not math.isfinite(self.value):
            return False
        if other is None or other.metric != self.metric:
            return True
        return self.value < other.value if self.metric.startswith("-") else self.value > other.value


def read_best(run_dir: Path) -> Score | None:
    """Return the best score whose checkpoint still stands, None without one.

    Raises:
        IntegrityError: `best.json` is damaged.
    """
    path = run_dir / "checkpoints" / BEST_NAME
    try:
        score = Score(**json.loads(path.read_text(encoding="utf-8")))
        return score if checkpoint_path(run_dir, step=score.step).is_dir() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); delete it to let the next evaluation decide") from error


def write_best(run_dir: Path, score: Score) -> None:
    """Name the best checkpoint."""
    replace_file(run_dir / "checkpoints" / BEST_NAME, json.dumps(asdict(score)).encode() + b"\n")


def best_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint that was best by `checkpoint.best`, not verified.

    Raises:
        UserError: the run names none.
        IntegrityError: `best.json` is damaged.
    """
    score = read_best(run_dir)
    if score is None:
        raise UserError(
            f"{run_dir}: no best checkpoint; a run keeps one that trains with checkpoint.best=EVALUATION/METRIC"
        )
    return checkpoint_path(run_dir, step=score.step)
