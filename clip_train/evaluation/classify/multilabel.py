"""Scores of images that may belong to several classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from clip_train.evaluation.confidence import bootstrap
from clip_train.evaluation.result import EvaluationResult

MULTILABEL_METRIC = "mean_average_precision"


def score_multilabel(labels: np.ndarray, cosines: np.ndarray, *, classnames: list[str]) -> EvaluationResult:
    """Score by mean average precision: for each class, how well its images rank above the others.

    A class without images counts 0, as in clip-benchmark.

    Args:
        labels: [N, C] bool.
        cosines: [N, C] of every image with every class.
        classnames: C names.
    """
    order = np.argsort(-cosines, axis=0, kind="stable")  # [N, C]: ties go to the earlier image
    ranked = np.take_along_axis(labels, order, axis=0)
    once = np.ones(len(labels), dtype=np.int64)
    per_class = [average_precision(ranked[:, c], once) for c in range(labels.shape[1])]

    def mean_average_precision(drawn: np.ndarray) -> float:
        return float(np.mean([average_precision(ranked[:, c], drawn[order[:, c]]) for c in range(labels.shape[1])]))

    total = labels.sum(axis=0)
    missing = int((total == 0).sum())
    warnings = [f"{missing} of {len(total)} classes have no image; each counts 0 in the mean"] if missing else []
    table: list[dict[str, Any]] = [
        {"class": c, "name": classnames[c], "images": int(total[c]), "average_precision": per_class[c]}
        for c in range(len(total))
    ]
    return EvaluationResult(
        task="zeroshot_classification",
        num_items=len(labels),
        metrics={MULTILABEL_METRIC: float(np.mean(per_class))},
        # Of a random order: about the share of the class.
        chance={MULTILABEL_METRIC: float(labels.mean())},
        intervals={MULTILABEL_METRIC: bootstrap(mean_average_precision, counts=once)},
        warnings=warnings,
        details={"per_class_average_precision": per_class},
        per_class=table,
    )


def average_precision(ranked: np.ndarray, drawn: np.ndarray) -> float:
    """Return the mean precision at the places of the right images.

    Args:
        ranked: [N] bool, whether the image is of the class, best first.
        drawn: [N] how often each of these images stands in the list.
    """
    hits = np.repeat(ranked, drawn)
    places = np.flatnonzero(hits)
    if not len(places):
        return 0.0
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1)))
