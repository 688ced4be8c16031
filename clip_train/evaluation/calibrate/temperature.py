"""Fit the temperature of a softmax, and measure how far its probabilities can be believed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from clip_train.calibration import Reliability
from clip_train.evaluation.features import similarity, to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NUM_BINS = 15
MAX_TEMPERATURE = 100.0
_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB
_PRECISION = 1e-6
_MAX_PASSES = 100


class Questions(NamedTuple):
    """Pictures, each with one right answer among the same labels."""

    images: Tensor  # [N, D] float32, unit length
    labels: Tensor  # [C, D] float32, unit length
    right: Tensor  # [N] int64 in [0, C)
    logit_scale: float

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [n, C] of some pictures after others, and their right answers [n]."""
        rows = max(1, _CHUNK_ELEMENTS // len(self.labels))
        for images, right in zip(self.images.split(rows), self.right.split(rows), strict=True):
            yield self.logit_scale * similarity(images, self.labels), right

    def take(self, places: np.ndarray) -> Questions:
        """Return the questions at `places`."""
        chosen = torch.from_numpy(places).to(self.right.device)
        return self._replace(images=self.images[chosen], right=self.right[chosen])


class Answers(NamedTuple):
    """What the model says to each question."""

    confidence: np.ndarray  # [N] float64, probability of the likeliest label
    correct: np.ndarray  # [N] bool; a tie goes to the lower label
    nll: np.ndarray  # [N] float64, of the right label
    brier: np.ndarray  # [N] float64


def fit_temperature(questions: Questions) -> float:
    """Return the temperature in [1/100, 100] with the lowest negative log-likelihood (Guo et al. 2017, §4.2).

    The likelihood is concave in the inverse temperature, so Newton's method within a shrinking bracket finds its
    maximum. If every answer is right by a margin there is none, and the bound is returned.
    """
    low, high, inverse = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE, 1.0
    for _ in range(_MAX_PASSES):
        slope, curvature = _derivatives(questions, inverse=inverse)
        if slope > 0:
            high = inverse
        else:
            low = inverse
        proposed = inverse - slope / curvature if curvature > 0 else math.inf
        if not low < proposed < high:
            proposed = math.sqrt(low * high)
        if abs(proposed - inverse) <= _PRECISION * inverse:
            return 1 / proposed
        inverse = proposed
    return 1 / inverse


def answer(questions: Questions, *, temperature: float) -> Answers:
    """Answer every question with softmax(logits / temperature)."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for logits, right in questions.logits():
        log_p = (logits.double() / temperature).log_softmax(dim=1)
        of_right = log_p.gather(1, right[:, None])[:, 0]
        best = log_p.amax(dim=1)
        first = (log_p == best[:, None]).to(torch.uint8).cumsum(dim=1).eq(0).sum(dim=1)  # [n] lowest of the likeliest
        p = log_p.exp()
        brier = p.square().sum(dim=1) - 2 * of_right.exp() + 1
        for column, values in zip(columns, (best.exp(), first == right, -of_right, brier), strict=True):
            column.append(to_numpy(values))
    return Answers(*(np.concatenate(column) for column in columns))


def measure_reliability(answers: Answers) -> Reliability:
    """Measure how far the confidences can be believed: top-label ECE over 15 equal bins (Guo et al. 2017, §2).

    A bin is closed above, so that a confidence of 1 falls into the last.
    """
    bins = np.clip(np.ceil(answers.confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    confidence = np.bincount(bins, weights=answers.confidence, minlength=NUM_BINS)
    correct = np.bincount(bins, weights=answers.correct, minlength=NUM_BINS)
    return Reliability(
        ece=float(np.abs(correct - confidence).sum() / len(bins)),
        nll=float(answers.nll.mean()),
        brier=float(answers.brier.mean()),
        accuracy=float(answers.correct.mean()),
        counts=counts.tolist(),
        confidences=_means(confidence, counts),
        accuracies=_means(correct, counts),
    )


def _derivatives(questions: Questions, *, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean negative log-likelihood by the inverse temperature."""
    slope = curvature = 0.0
    for logits, right in questions.logits():
        logits = logits.double()
        p = (inverse * logits).softmax(dim=1)
        mean = (p * logits).sum(dim=1)
        slope += float((mean - logits.gather(1, right[:, None])[:, 0]).sum())
        curvature += float(((p * logits.square()).sum(dim=1) - mean.square()).sum())
    return slope / len(questions.right), curvature / len(questions.right)


def _means(sums: np.ndarray, counts: np.ndarray) -> list[float | None]:
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
