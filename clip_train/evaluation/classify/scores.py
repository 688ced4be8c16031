"""Scores of predictions, from integer counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_train.evaluation.confidence import bootstrap, bootstrap_mean_per_class, wilson_interval
from clip_train.evaluation.result import EvaluationResult

NUM_TOP = 5
NUM_CONFUSIONS = 20


def metric_names(num_classes: int) -> list[str]:
    """Return the names of the metrics of `score`."""
    return ["acc1", *(["acc5"] if num_classes >= NUM_TOP else []), "mean_per_class_recall", "f1_macro"]


def score(
    labels: np.ndarray, top: np.ndarray, *, num_classes: int, classnames: Sequence[str] | None = None
) -> EvaluationResult:
    """Score predictions of one class per image.

    Args:
        labels: [N] right class of each image.
        top: [N, K] likeliest classes, best first.
        num_classes: C; chance is that of guessing evenly among all of them.
        classnames: C names for the tables of classes and confusions; their numbers if None.
    """
    n = len(labels)
    hits = top == labels[:, None]
    correct1 = int(hits[:, 0].sum())
    total = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[hits[:, 0]], minlength=num_classes)
    present = total > 0
    metrics = {"acc1": correct1 / n}
    intervals = {"acc1": wilson_interval(correct1, total=n)}
    chance = {"acc1": 1 / num_classes}
    if num_classes >= NUM_TOP:
        correct5 = int(hits.any(axis=1).sum())
        metrics["acc5"] = correct5 / n
        intervals["acc5"] = wilson_interval(correct5, total=n)
        chance["acc5"] = NUM_TOP / num_classes
    metrics["mean_per_class_recall"] = float((correct[present] / total[present]).mean())
    intervals["mean_per_class_recall"] = bootstrap_mean_per_class(correct, total)
    chance["mean_per_class_recall"] = 1 / num_classes
    metrics["f1_macro"] = f1_macro(labels, top[:, 0], num_classes=num_classes)
    intervals["f1_macro"] = _f1_interval(labels, top[:, 0], num_classes=num_classes)
    share = total[present] / n
    chance["f1_macro"] = float((2 * share / (num_classes * share + 1)).mean())
    warnings = []
    if num_classes > 1 and n > 1 and (top[:, 0] == top[0, 0]).all():
        warnings.append(f"every image is put in class {int(top[0, 0])}")
    missing = int((~present).sum())
    if missing:
        warnings.append(f"{missing} of {num_classes} classes have no image; they do not count in the mean recall")
    names = classnames or [str(c) for c in range(num_classes)]
    return EvaluationResult(
        task="zeroshot_classification",
        num_items=n,
        metrics=metrics,
        chance=chance,
        intervals=intervals,
        warnings=warnings,
        details={
            "per_class_recall": [float(c / t) if t else None for c, t in zip(correct, total, strict=True)],
            "confusions": confusions(labels, top[:, 0], classnames=names),
        },
        per_class=class_table(labels, top[:, 0], classnames=names),
    )


def f1_macro(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> float:
    """Return the mean F1 of the classes that have images, as WILDS counts it for iWildCam."""
    right = np.bincount(labels[labels == predicted], minlength=num_classes)
    total = np.bincount(labels, minlength=num_classes)
    given = np.bincount(predicted, minlength=num_classes)
    present = total > 0
    return float((2 * right[present] / (total[present] + given[present])).mean())


def confusions(labels: np.ndarray, predicted: np.ndarray, *, classnames: Sequence[str]) -> list[dict[str, Any]]:
    """Return the commonest mistakes: class, what was answered, how often, of how many images."""
    wrong = labels != predicted
    counts = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    total = np.bincount(labels)
    return [
        {"class": classnames[truth], "answer": classnames[answer], "n": count, "of": int(total[truth])}
        for (truth, answer), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_CONFUSIONS]
    ]


def class_table(labels: np.ndarray, predicted: np.ndarray, *, classnames: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per class: images, recall, how often it was answered, precision, commonest wrong answer."""
    num_classes = len(classnames)
    total = np.bincount(labels, minlength=num_classes)
    given = np.bincount(predicted, minlength=num_classes)
    right = np.bincount(labels[labels == predicted], minlength=num_classes)
    mistakes: list[Counter[int]] = [Counter() for _ in range(num_classes)]
    for truth, answer in zip(labels.tolist(), predicted.tolist(), strict=True):
        if truth != answer:
            mistakes[truth][answer] += 1
    return [
        {
            "class": c,
            "name": classnames[c],
            "images": int(total[c]),
            "recall": right[c] / total[c] if total[c] else None,
            "answered": int(given[c]),
            "precision": right[c] / given[c] if given[c] else None,
            "commonest_mistake": classnames[mistakes[c].most_common(1)[0][0]] if mistakes[c] else "",
        }
        for c in range(num_classes)
    ]


def _f1_interval(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> tuple[float, float]:
    # Images with equal (label, answer) are interchangeable, and so few numbers stand for many images.
    pairs, counts = np.unique(labels * num_classes + predicted, return_counts=True)
    truth, answer = np.divmod(pairs, num_classes)

    def f1(drawn: np.ndarray) -> float:
        total = np.bincount(truth, drawn, minlength=num_classes)
        given = np.bincount(answer, drawn, minlength=num_classes)
        right = np.bincount(truth[truth == answer], drawn[truth == answer], minlength=num_classes)
        present = total > 0
        return float((2 * right[present] / (total[present] + given[present])).mean())

    return bootstrap(f1, counts=counts)
