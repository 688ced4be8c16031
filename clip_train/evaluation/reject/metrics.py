"""How well a score separates known items from foreign ones, or right answers from wrong ones. Ties are exact.

Known items are the positives: their scores should be the higher ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_train.evaluation.confidence import NUM_RESAMPLES, percentiles

TPR_PERCENT = 95
_COUNTS_AT_ONCE = 2**22  # of resamples: 32 MiB each


class LevelCounts(NamedTuple):
    """Items at each distinct score, the highest first."""

    known: np.ndarray  # [..., U] int64
    foreign: np.ndarray  # [..., U] int64


def auroc(known: np.ndarray, foreign: np.ndarray) -> float:
    """Return the chance that a known item scores above a foreign one, a tie counting half (Mann & Whitney 1947).

    Args:
        known: [N] scores.
        foreign: [M] scores.
    """
    return float(_auroc(_count_levels(known, foreign)))


def aupr(known: np.ndarray, foreign: np.ndarray) -> float:
    """Return the average precision of finding the known items [N] among the foreign [M], without interpolation."""
    return float(_aupr(_count_levels(known, foreign)))


def fpr_at_95_tpr(known: np.ndarray, foreign: np.ndarray) -> float:
    """Return the share of foreign items [M] that pass the threshold which at least 95 % of the known [N] pass."""
    return float(_fpr_at_95_tpr(_count_levels(known, foreign)))


def threshold_at_95_tpr(known: np.ndarray) -> float:
    """Return the highest threshold that at least 95 % of the known items [N] reach; reaching it is passing."""
    num_passing = _num_at_95_percent(len(known))
    return float(np.partition(known, len(known) - num_passing)[len(known) - num_passing])


def intervals(known: np.ndarray, foreign: np.ndarray, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of `auroc`, `aupr` and `fpr_at_95_tpr` when both sets are resampled.

    Args:
        known: [N] scores.
        foreign: [M] scores.
        seed: of the 1,000 resamples.
    """
    levels, level_of = np.unique(-np.concatenate([known, foreign]), return_inverse=True)
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    per_chunk = max(1, _COUNTS_AT_ONCE // len(levels))
    for start in range(0, NUM_RESAMPLES, per_chunk):
        num_resamples = min(per_chunk, NUM_RESAMPLES - start)
        drawn = np.empty((2, num_resamples, len(levels)), dtype=np.int64)
        for i in range(num_resamples):
            for counts, of_set in zip(drawn, (level_of[: len(known)], level_of[len(known) :]), strict=True):
                counts[i] = np.bincount(of_set[rng.integers(len(of_set), size=len(of_set))], minlength=len(levels))
        for name, metric in METRICS.items():
            found[name].append(metric(LevelCounts(*drawn)))
    return {name: percentiles(np.concatenate(values)) for name, values in found.items()}


def risk_coverage(scores: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return the share of wrong answers [N] among the 1, 2, … N answers of the highest scores.

    Where a cut falls into equal scores, it is the mean over all orders of these (Geifman & El-Yaniv 2017, §2).

    Args:
        scores: [N] confidence in each answer.
        wrong: [N] bool.
    """
    levels, level_of = np.unique(-scores, return_inverse=True)
    share_wrong = np.bincount(level_of, weights=wrong, minlength=len(levels)) / np.bincount(level_of)
    expected = share_wrong[np.sort(level_of)]  # [N] best first
    return np.asarray(expected.cumsum() / np.arange(1, len(scores) + 1))


def aurc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the mean of `risk_coverage`: lower is better, and useless scores give the share of wrong answers."""
    return float(risk_coverage(scores, wrong).mean())


def _count_levels(known: np.ndarray, foreign: np.ndarray) -> LevelCounts:
    levels, level_of = np.unique(-np.concatenate([known, foreign]), return_inverse=True)
    both = (level_of[: len(known)], level_of[len(known) :])
    return LevelCounts(*(np.bincount(of_set, minlength=len(levels)) for of_set in both))


def _num_at_95_percent(num_items: int) -> int:
    return -(-TPR_PERCENT * num_items // 100)


def _auroc(counts: LevelCounts) -> np.ndarray:
    below_or_equal = counts.foreign[..., ::-1].cumsum(axis=-1)[..., ::-1]
    twice_won = (counts.known * (2 * below_or_equal - counts.foreign)).sum(axis=-1)
    return np.asarray(twice_won / (2 * counts.known.sum(axis=-1) * counts.foreign.sum(axis=-1)))


def _aupr(counts: LevelCounts) -> np.ndarray:
    found = counts.known.cumsum(axis=-1)
    passed = found + counts.foreign.cumsum(axis=-1)
    precision = found / np.maximum(passed, 1)  # a resample may have nothing at the highest scores
    return np.asarray((counts.known * precision).sum(axis=-1) / found[..., -1])


def _fpr_at_95_tpr(counts: LevelCounts) -> np.ndarray:
    found, passed = counts.known.cumsum(axis=-1), counts.foreign.cumsum(axis=-1)
    num_passing = _num_at_95_percent(int(found.flat[-1]))
    threshold = (found >= num_passing).argmax(axis=-1)
    return np.asarray(np.take_along_axis(passed, threshold[..., None], axis=-1)[..., 0] / passed[..., -1])


METRICS: dict[str, Callable[[LevelCounts], np.ndarray]] = {
    "auroc": _auroc,
    "aupr": _aupr,
    "fpr_at_95_tpr": _fpr_at_95_tpr,
}
