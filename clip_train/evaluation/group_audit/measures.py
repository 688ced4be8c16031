"""Differences between groups, by counting."""

from __future__ import annotations

from typing import Any

import numpy as np

from clip_train.evaluation.confidence import NUM_RESAMPLES, percentiles

NUM_ASSOCIATIONS = 10


def count_by_group(groups: np.ndarray, hits: np.ndarray, *, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hits and images per group, [G] each.

    Args:
        groups: [N] int64 in [0, G), -1 for images without a group.
        hits: [N] bool.
        num_groups: G.
    """
    total = np.bincount(groups[groups >= 0], minlength=num_groups)
    return np.bincount(groups[hits & (groups >= 0)], minlength=num_groups), total


def bootstrap_gap(hits: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the highest less the lowest accuracy, when images are resampled.

    Args:
        hits: [G] right answers per group.
        total: [G] images per group.
    """
    cells = np.concatenate([hits, total - hits])
    drawn = np.random.default_rng(0).multinomial(cells.sum(), cells / cells.sum(), size=NUM_RESAMPLES)
    right, wrong = drawn[:, : len(hits)], drawn[:, len(hits) :]
    seen = right + wrong > 0  # a resample may miss a small group
    accuracy = right / np.where(seen, right + wrong, 1)
    lowest = np.where(seen, accuracy, np.inf).min(axis=1)
    highest = np.where(seen, accuracy, -np.inf).max(axis=1)
    return percentiles(highest - lowest)


def label_rates(groups: np.ndarray, predicted: np.ndarray, *, num_groups: int, num_classes: int) -> np.ndarray:
    """Return the share of each group's images that is given each label, [G, C]; a group without images has zeros."""
    inside = groups >= 0
    cells = np.bincount(groups[inside] * num_classes + predicted[inside], minlength=num_groups * num_classes)
    counts = cells.reshape(num_groups, num_classes)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def strongest_associations(rates: np.ndarray, *, groups: list[str], classnames: list[str]) -> list[dict[str, Any]]:
    """Return the labels whose rates differ most between groups, with the groups that have them most and least often.

    Args:
        rates: [G, C] of `label_rates`, of the groups that are large enough to be compared.
        groups: G names.
        classnames: C names.
    """
    spread = rates.max(axis=0) - rates.min(axis=0)
    return [
        {
            "label": classnames[c],
            "difference": float(spread[c]),
            "most": groups[int(rates[:, c].argmax())],
            "most_rate": float(rates[:, c].max()),
            "least": groups[int(rates[:, c].argmin())],
            "least_rate": float(rates[:, c].min()),
        }
        for c in np.argsort(-spread, kind="stable")[:NUM_ASSOCIATIONS]
        if spread[c] > 0
    ]


def max_skew(ranked: np.ndarray, *, share: np.ndarray, k: int) -> float:
    """Return MaxSkew@k of one ranking: the largest ln(share among the first k / share in the set) over the groups.

    0 means that the first k are made up like the set (Geyik et al. 2019, arXiv 1905.01989, §3.3).

    Args:
        ranked: [n] group of each retrieved image, nearest first.
        share: [G] share of each group in the set.
        k: at most n.
    """
    found = np.bincount(ranked[:k], minlength=len(share)) / k
    present = (found > 0) & (share > 0)
    return float(np.log(found[present] / share[present]).max())


def ndkl(ranked: np.ndarray, *, share: np.ndarray) -> float:
    """Return the normalised discounted cumulative KL divergence of one ranking from the make-up of the set.

    The mean over i of KL(first i || set) with weights 1 / log2(i + 1); 0 means even all the way down (Geyik et al.
    2019, §3.3).

    Args:
        ranked: [n] group of each image, nearest first.
        share: [G] share of each group in the set.
    """
    place = np.arange(1, len(ranked) + 1)
    divergence = np.zeros(len(ranked))
    for group in np.flatnonzero(share):  # one group at a time: [n] values, not [n, G]
        found = np.cumsum(ranked == group) / place
        seen = found > 0
        divergence[seen] += found[seen] * np.log(found[seen] / share[group])
    weight = 1 / np.log2(place + 1)
    return float((weight * divergence).sum() / weight.sum())
