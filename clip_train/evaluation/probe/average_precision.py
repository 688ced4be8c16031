"""VOC2007's average precision, which interpolates at eleven recalls."""

from __future__ import annotations

import numpy as np


def eleven_point(labels: np.ndarray, scores: np.ndarray, drawn: np.ndarray) -> float:
    """Return the mean over the classes of the mean over recalls 0, 0.1 … 1 of the best precision at or above them.

    Everingham et al. 2010, §4.2. Classes without images count 0; equal scores keep the order of the images.

    Args:
        labels: [N, C] bool.
        scores: [N, C].
        drawn: [N] how often each image counts.
    """
    return float(np.mean([_of_class(labels[:, c], scores[:, c], drawn) for c in range(labels.shape[1])]))


def _of_class(right: np.ndarray, scores: np.ndarray, drawn: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.repeat(right[order], drawn[order])
    if not hits.any():
        return 0.0
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / found[-1]
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    # A recall such as 3/10 may lie a rounding below 0.3.
    first = np.searchsorted(recall + 1e-12, np.arange(11) / 10)
    return float(best_from_here[first].mean())
