"""95 % intervals of scores. They cover the sampling of the test set, not the spread over training seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Z_95 = 1.959963984540054
NUM_RESAMPLES = 1000


def wilson_interval(correct: int, *, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    p, z2 = correct / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * (p * (1 - p) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ratio(hits: np.ndarray, trials: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of sum(hits) / sum(trials) when images are resampled, each with all its trials.

    Args:
        hits: [N] integers, per image.
        trials: [N] integers, per image, at least 1.
    """
    # Images with equal (hits, trials) are interchangeable: drawing the number of each kind is the same bootstrap.
    kinds, counts = np.unique(np.stack([hits, trials]), axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)
    ratios = (drawn @ kinds[0]) / (drawn @ kinds[1])
    return percentiles(ratios)


def bootstrap_mean_recall(hits: np.ndarray, trials: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of sum(hits) / sum(trials) and mean(found) when images are resampled.

    Args:
        hits: [N] integers, captions of each image that find it.
        trials: [N] integers, captions of each image, at least 1.
        found: [N] bool, whether each image finds a caption of its own.
    """
    kinds, counts = np.unique(np.stack([hits, trials, found]), axis=1, return_counts=True)
    by_caption, captions, by_image = kinds
    return bootstrap(lambda n: float(n @ by_caption / (n @ captions) + n @ by_image / n.sum()) / 2, counts=counts)


def bootstrap_mean_per_class(correct: np.ndarray, total: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean per-class recall when images are resampled.

    Args:
        correct: [C] right answers per class.
        total: [C] images per class; classes without images do not count.
    """
    cells = np.concatenate([correct, total - correct])
    drawn = np.random.default_rng(seed).multinomial(cells.sum(), cells / cells.sum(), size=NUM_RESAMPLES)
    right, wrong = drawn[:, : len(correct)], drawn[:, len(correct) :]
    present = right + wrong > 0
    recall = right / np.where(present, right + wrong, 1)
    return percentiles(recall.sum(axis=1) / present.sum(axis=1))


def bootstrap(
    statistic: Callable[[np.ndarray], float], *, counts: np.ndarray, seed: int = 0
) -> tuple[float, float]:  # fmt: skip
    """Return the 95 % interval of any statistic when images are resampled.

    Args:
        statistic: of how often each kind of image is drawn, [K] integers.
        counts: [K] images of each kind; interchangeable images are of one kind.
        seed: of the resampling.
    """
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)
    return percentiles(np.array([statistic(row) for row in drawn]))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the ends between which the middle 95 % of resampled values [R] lie."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
