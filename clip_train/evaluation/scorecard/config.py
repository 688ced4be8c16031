"""Choices of `evaluation.NAME` with the name `scorecard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.scorecard.evaluator import Scorecard

BLOCK = 24  # the least common multiple of what the cards need to be balanced


@dataclass(slots=True, kw_only=True)
class ScorecardConfig(EvaluationConfig):
    """Counting, binding, relations, written words, negation and foreign pictures, beside a control."""

    name: str = "scorecard"
    items: int = 600
    """Items of each of the seven cards, a multiple of 24. 600 decide differences of about 4 points."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        EvaluationConfig.__post_init__(self)
        if self.items < BLOCK or self.items % BLOCK:
            raise UserError(f"items={self.items} must be a multiple of {BLOCK}")

    def missing(self) -> str | None:
        """Return None: the pictures are drawn when they are needed."""
        return None

    def open(self, setting: Setting) -> Scorecard:
        """Compose the cards. Every rank composes the same ones and draws its own pictures."""
        from clip_train.evaluation.scorecard.evaluator import Scorecard

        return Scorecard(self.items, setting=setting)
