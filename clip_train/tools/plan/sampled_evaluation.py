"""Time an evaluation by doing a part of it: the first seconds of reading and of each tower are real, the rest is told.

The evaluator itself runs to its end, on features that are random where the tower was not asked, so that everything it
does besides costs what it costs.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from clip_train.data.sequential import EvaluationBatch, evaluation_batches
from clip_train.evaluation.config import EvaluationConfig
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import WrappedEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from clip_train.data.sequential import ImageSource
    from clip_train.distributed.world import World
    from clip_train.evaluation.features import Batches, DualEncoder, Tokenizer
    from clip_train.evaluation.result import EvaluationResult
    from clip_train.evaluation.samples import ReportSamples

REAL_SECONDS = 5.0  # of each kind of work
_REAL_CALLS = 3  # at least; the first may warm up
MEASURED = "measured_seconds"


class Work:
    """One kind of work: done for some seconds, then only counted."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._amounts: list[float] = []
        self.saved_seconds = 0.0

    @property
    def is_known(self) -> bool:
        """Whether enough was done to tell the rest."""
        return len(self._seconds) >= _REAL_CALLS and sum(self._seconds) >= REAL_SECONDS

    def add(self, amount: float, *, seconds: float) -> None:
        """Note a call that was made."""
        self._seconds.append(seconds)
        self._amounts.append(amount)

    def skip(self, amount: float) -> None:
        """Count a call that was not made."""
        self.saved_seconds += amount * sum(self._seconds[1:]) / sum(self._amounts[1:])


class Clock:
    """All the work of one evaluation."""

    def __init__(self) -> None:
        self.reading, self.images, self.texts = Work(), Work(), Work()

    @property
    def saved_seconds(self) -> float:
        """Seconds that the whole evaluation would take besides."""
        return sum(work.saved_seconds for work in (self.reading, self.images, self.texts))


def sampled(config: EvaluationConfig) -> EvaluationConfig:
    """Return the same evaluation with an evaluator that does a part of the work and tells the seconds of all of it."""
    kind = type(f"Sampled{type(config).__name__}", (_Sampling, type(config)), {"__slots__": ()})
    chosen: EvaluationConfig = kind(**{item.name: getattr(config, item.name) for item in fields(config)})
    return chosen


class _Sampling(EvaluationConfig):
    """Overrides how an evaluation is built; its keys stay those of its choice, so that the run's config can be read."""

    __slots__ = ()

    def build(self, *, world: World, tokenizer: Tokenizer, image_size: int, squash: bool = False) -> Evaluator:
        clock = Clock()

        def read(source: ImageSource) -> Batches:
            def batches() -> Iterator[EvaluationBatch]:
                real = evaluation_batches(
                    source, world=world, image_size=image_size, squash=squash, batch_size=self.batch_size,
                    workers=self.workers,
                )  # fmt: skip
                places = _places(len(source), world=world, batch_size=self.batch_size)
                return _sampled(real, places=places, clock=clock)

            return batches

        setting = Setting(
            world=world, tokenizer=tokenizer, read=read, image_size=image_size, precision=self.precision.value
        )
        return SampledEvaluator(self.open(setting), clock=clock)


class SampledEvaluator(Evaluator):
    """Runs another evaluator on a model that answers at random where it need not be asked."""

    def __init__(self, inner: Evaluator, *, clock: Clock) -> None:
        super().__init__(inner.setting)
        self._inner, self._clock = inner, clock

    def evaluate(self, model: DualEncoder) -> EvaluationResult:
        """Return the result with the seconds that the whole evaluation takes, and those that were spent."""
        before = self._clock.saved_seconds
        result = self._inner.evaluate(SampledEncoder(model, clock=self._clock, device=self.world.device))
        result.details[MEASURED] = result.seconds
        result.seconds += self._clock.saved_seconds - before
        return result

    @property
    def has_loss(self) -> bool:
        """That of the other evaluator."""
        return self._inner.has_loss

    def metric_names(self) -> list[str]:
        """Return those of the other evaluator."""
        return self._inner.metric_names()

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Do the work of the other evaluator."""
        return self._inner.measure(model)

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples | None:
        """Return those of the other evaluator."""
        return self._inner.samples(result, size=size)


class SampledEncoder(WrappedEncoder):
    """A model whose towers compute until it is known how long they take."""

    def __init__(self, model: DualEncoder, *, clock: Clock, device: torch.device) -> None:
        super().__init__(model)
        self._clock, self._device = clock, device
        self._width: dict[str, int] = {}

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D]."""
        return self._ask(
            "image", self._clock.images, lambda: self.model.encode_image(images, normalize=normalize),
            rows=len(images), amount=len(images), normalize=normalize,
        )  # fmt: skip

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D]."""
        return self._ask(
            "text", self._clock.texts, lambda: self.model.encode_text(tokens, normalize=normalize),
            rows=len(tokens), amount=tokens.numel(), normalize=normalize,
        )  # fmt: skip

    def pool_image(self, images: Tensor) -> Tensor:
        """Return features [B, width] before the projection."""
        return self._ask(
            "pooled", self._clock.images, lambda: self.model.pool_image(images),
            rows=len(images), amount=len(images), normalize=False,
        )  # fmt: skip

    def _ask(
        self, kind: str, work: Work, compute: Callable[[], Tensor], *, rows: int, amount: int, normalize: bool
    ) -> Tensor:
        if work.is_known and kind in self._width:
            work.skip(amount)
            features = torch.randn(rows, self._width[kind], device=self._device)
            return F.normalize(features, dim=-1) if normalize else features
        features, seconds = _timed(compute, device=self._device)
        work.add(amount, seconds=seconds)
        self._width[kind] = features.shape[1]
        return features


def _sampled(
    real: Iterator[EvaluationBatch], *, places: list[tuple[Tensor, Tensor]], clock: Clock
) -> Iterator[EvaluationBatch]:
    batch: EvaluationBatch | None = None
    for indices, valid in places:
        if clock.reading.is_known and batch is not None:
            clock.reading.skip(1)
            yield EvaluationBatch(batch.images, indices, valid)
            continue
        began = time.monotonic()
        batch = next(real)
        clock.reading.add(1, seconds=time.monotonic() - began)
        yield batch


def _places(num_images: int, *, world: World, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return indices [B] and valid [B] of each of this rank's batches, as `evaluation_batches` gives them."""
    piece = -(-num_images // world.size)
    first, last = world.rank * piece, min((world.rank + 1) * piece, num_images)
    found = []
    for start in range(first, first + piece, batch_size):
        indices = torch.arange(start, start + batch_size)
        valid = indices < min(start + batch_size, last)
        found.append((torch.where(valid, indices, -1), valid))
    return found


def _timed(compute: Callable[[], Any], *, device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.monotonic()
    result = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.monotonic() - began
