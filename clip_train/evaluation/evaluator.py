"""What every evaluator is given and how it is run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_train.evaluation.features import Batches, DualEncoder, Tokenizer, evaluating

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource
    from clip_train.distributed.world import World
    from clip_train.evaluation.result import EvaluationResult
    from clip_train.evaluation.samples import ReportSamples


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an evaluator works with besides its set."""

    world: World
    """The ranks that share the work."""
    tokenizer: Tokenizer
    """The model's own."""
    read: Callable[[ImageSource], Batches]
    """Makes passes over this rank's piece of a set of images, padded so that all ranks see equally many rows."""
    image_size: int
    """Side of the model's input in pixels."""
    precision: str = "auto"
    """Of the towers: `auto`, `fp32` or `bf16`."""


class Evaluator(ABC):
    """An evaluation set with its scores."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.world = setting.world

    def evaluate(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and predictions; no metric if the features have collapsed.

        All ranks take part and get the same result. The model is left in the mode it came in.

        Raises:
            IntegrityError: not every image of the set was seen exactly once.
        """
        started = time.monotonic()
        with evaluating(model, world=self.world, precision=self.setting.precision) as precision:
            result = self.measure(model)
        if result.collapsed:
            # A plausible number that ties have made must not stand anywhere.
            result.metrics, result.intervals, result.parts, result.details, result.per_class = {}, {}, {}, {}, []
            result.notes, result.loss = [], None
        assert result.collapsed or result.metrics.keys() == set(self.metric_names()), sorted(result.metrics)
        assert self.has_loss or result.loss is None
        result.details["precision"] = precision
        result.seconds = time.monotonic() - started
        return result

    @property
    def has_loss(self) -> bool:
        """Whether results have a loss, logged as `NAME/loss`."""
        return False

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Return the names of all metrics that `evaluate` gives of this set, before it has run."""

    @abstractmethod
    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Do the work of `evaluate`, with the model in evaluation mode, without gradients and under its precision."""

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples | None:
        """Return pictures with the answers in `result` for the report, None if there are none to show.

        Args:
            result: the newest result of this evaluator. One rank alone may ask.
            size: side of the square pictures in pixels.
        """
        return None
