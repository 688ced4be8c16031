"""What an evaluator returns, and its files in clip-benchmark's shape."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.errors import IntegrityError
from clip_train.files import replace_file

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource

LOWER_IS_BETTER = ("fpr_at_95_tpr", "ece_before", "ece_after")
"""Metrics that are errors: they have no share of the way from chance to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The scores of the items with one tag, as an `EvaluationResult` has them."""

    num_items: int
    metrics: dict[str, float]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(slots=True, kw_only=True)
class EvaluationResult:
    """The scores of one evaluation and what they rest on. Equal on every rank."""

    task: str
    """`zeroshot_classification`, `zeroshot_retrieval`, `image_caption_selection`, `image_selection`,
    `out_of_distribution_detection` or `calibration`."""
    num_items: int
    """Images, or items of a set of choices: all of the set."""
    metrics: dict[str, float]
    """Scores in [0, 1]; empty when collapsed."""
    chance: dict[str, float]
    """What guessing would score on average, for each metric that has such a level."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals: Wilson for accuracies, bootstrap over images for the rest."""
    loss: float | None = None
    """Of held-out pairs, all of the set as one batch; no score in [0, 1], and logged as `NAME/loss`."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """What a score means, by metric; empty where an evaluation leaves that to the reader."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Scores of the items with each tag; empty when collapsed."""
    collapsed: str | None = None
    """Why the features are worth no score, or None."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Results that are no scores, as lines for a person; their values are among the details."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further values for the JSON file."""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-item arrays, for paired comparisons and the report; `key` names the items."""
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """One row per class for the table of classes; empty where there are none."""
    seconds: float = 0.0


def write_result(result: EvaluationResult, path: Path, *, dataset: str, model: str, pretrained: str = "") -> None:
    """Write `path` (.json, clip-benchmark's keys and ours under `clip_train`), and what there is besides.

    That is the predictions (`.npz`) and the table of classes (`.classes.csv`).

    Args:
        path: the JSON file; its folder is made.
        dataset: name of the evaluation, e.g. `imagenet`.
        model: name of the model, e.g. `ViT-B-32`.
        pretrained: which weights, e.g. a checkpoint's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float | None] = dict(result.metrics)
    if "acc1" in metrics:
        metrics.setdefault("acc5", None)  # below five classes; the key is part of the format
    content = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": result.task,
        "metrics": metrics,
        "language": "en",
        "clip_train": {
            "status": "collapsed" if result.collapsed else "ok",
            "reason": result.collapsed,
            "warnings": result.warnings,
            "n": result.num_items,
            "chance": result.chance,
            "intervals": result.intervals,
            "normalised": {
                name: _above_chance(result.metrics[name], chance)
                for name, chance in result.chance.items()
                if name in result.metrics and name not in LOWER_IS_BETTER
            },
            "seconds": round(result.seconds, 3),
            **({"items_sha256": items_sha256(result.predictions)} if "key" in result.predictions else {}),
            **({} if result.loss is None else {"loss": result.loss}),
            **({"verdicts": result.verdicts} if result.verdicts else {}),
            **({"notes": result.notes} if result.notes else {}),
            **({"parts": {tag: _part(part) for tag, part in result.parts.items()}} if result.parts else {}),
            **result.details,
        },
    }
    if result.predictions:
        arrays: dict[str, Any] = dict(result.predictions)  # numpy's own annotation confuses names with its flags
        np.savez_compressed(path.with_suffix(".npz"), **arrays)
    if result.per_class:
        with path.with_suffix(".classes.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(result.per_class[0]))
            writer.writeheader()
            writer.writerows(result.per_class)
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file, ours or clip-benchmark's, whose bare `NaN` becomes None.

    Raises:
        IntegrityError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as an evaluation result: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise IntegrityError(f"{path} has no `metrics`: it is not an evaluation result")
    metrics: Mapping[str, Any] = content["metrics"]
    return {**content, "metrics": {k: None if _is_nan(v) else v for k, v in metrics.items()}}


def item_keys(source: ImageSource) -> np.ndarray:
    """Return the name of every picture, [N] text, by which the results of several models are paired."""
    return np.array([source.key(i) for i in range(len(source))])


def items_sha256(predictions: Mapping[str, np.ndarray]) -> str:
    """Return a hash of the items' names, in order, with the truth about each: equal where the same set was asked."""
    digest = hashlib.sha256()
    for name in ("key", "label", "owner"):
        if (column := predictions.get(name)) is not None:
            digest.update(json.dumps({name: column.tolist()}).encode())
    return digest.hexdigest()


def evenly_spaced(num_items: int, *, count: int) -> np.ndarray:
    """Return up to `count` places spread evenly over [0, num_items): a sample that nobody has picked."""
    return np.unique(np.linspace(0, num_items - 1, min(count, num_items)).round().astype(np.int64))


def two_halves(num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of two halves of a set, drawn with a fixed seed: one to fit on, and the other to judge by."""
    order = np.random.default_rng(0).permutation(num_items)
    return np.sort(order[: num_items // 2]), np.sort(order[num_items // 2 :])


def _part(part: Part) -> dict[str, Any]:
    return {"n": part.num_items, "metrics": part.metrics, "chance": part.chance, "intervals": part.intervals}


def _above_chance(value: float, chance: float) -> float | None:
    return (value - chance) / (1 - chance) if chance < 1 else None


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
