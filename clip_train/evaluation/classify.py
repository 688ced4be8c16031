"""Zero-shot classification on all ranks."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.classifier import ZeroShotClassifier, build_classifier, tokenize_prompts
from clip_train.evaluation.collapse import TowerStatistics
from clip_train.evaluation.confidence import bootstrap_mean_per_class, wilson_interval
from clip_train.evaluation.features import (
    Batches,
    DualEncoder,
    TokenizedTexts,
    Tokenizer,
    encode_images,
    evaluating,
    gather_items,
    to_numpy,
)
from clip_train.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from clip_train.evaluation.labelled_images import LabelledImages

NUM_TOP = 5


class Classify:
    """Accuracy among all classes of a labelled set: acc1, acc5 (from five classes on) and mean per-class recall.

    Args:
        images: the labelled set, the same on every rank.
        world: the ranks that share the work.
        tokenizer: the model's own.
        batches: makes one pass over this rank's piece of the set; padded so that all ranks see equally many rows.
        precision: of the towers, `auto`, `fp32` or `bf16`.
    """

    def __init__(
        self,
        images: LabelledImages,
        *,
        world: World,
        tokenizer: Tokenizer,
        batches: Batches,
        precision: str = "auto",
    ) -> None:
        self.images = images
        self._world = world
        self._tokenizer = tokenizer
        self._batches = batches
        self._precision = precision

    def run(self, model: DualEncoder) -> dict[str, float]:
        """Return the metrics; none if the features have collapsed. All ranks take part."""
        return self.evaluate(model).metrics

    def evaluate(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and the five likeliest classes of every image. All ranks take part.

        Raises:
            IntegrityError: not every image of the set was seen exactly once.
        """
        started = time.monotonic()
        images = self.images
        with evaluating(model, world=self._world, precision=self._precision):
            classifier = build_classifier(model, self._prompts, classnames=images.classnames, world=self._world)
            predictions, collapsed = self._predict(model, classifier)
        predictions["label"] = images.labels
        result = score(images.labels, predictions["top"], num_classes=len(images.classnames))
        result.predictions = predictions
        result.details |= {"templates": len(images.templates), "classes": len(images.classnames)}
        if collapsed:
            result.collapsed, result.metrics, result.intervals = collapsed, {}, {}
        result.seconds = time.monotonic() - started
        return result

    @cached_property
    def _prompts(self) -> TokenizedTexts:
        # ImageNet has 80,000: once per run, not once per evaluation.
        return tokenize_prompts(
            self._tokenizer, classnames=self.images.classnames, templates=self.images.templates
        )  # fmt: skip

    def _predict(self, model: DualEncoder, classifier: ZeroShotClassifier) -> tuple[dict[str, np.ndarray], str | None]:
        """Return `top` [N, K] and its `cosine` [N, K], in index order, and why a tower counts as collapsed."""
        embed_dim = classifier.vectors.shape[1]
        statistics = TowerStatistics(embed_dim=embed_dim, world=self._world)
        indices, valids, tops, cosines = [], [], [], []
        for features, index, valid in encode_images(model, self._batches, world=self._world):
            statistics.add(features[valid])
            # A stable sort breaks ties to the lower class.
            cosine, top = classifier.cosines(features).sort(dim=1, descending=True, stable=True)
            indices.append(index)
            valids.append(valid)
            tops.append(top[:, :NUM_TOP])
            cosines.append(cosine[:, :NUM_TOP])
        statistics.reduce()
        columns = gather_items(
            torch.cat(indices),
            {"top": torch.cat(tops), "cosine": torch.cat(cosines)},
            valid=torch.cat(valids),
            num_items=len(self.images.labels),
            world=self._world,
        )
        text_statistics = TowerStatistics(embed_dim=embed_dim, world=World(device=self._world.device))
        text_statistics.add(classifier.vectors)
        collapsed = statistics.reason("image") or text_statistics.reason("text")
        return {name: to_numpy(column) for name, column in columns.items()}, collapsed


def score(labels: np.ndarray, top: np.ndarray, *, num_classes: int) -> EvaluationResult:
    """Score predictions by integer counts.

    Args:
        labels: [N] right class of each image.
        top: [N, K] likeliest classes, best first.
        num_classes: C; chance is that of guessing evenly among all of them.
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
    warnings = []
    if num_classes > 1 and n > 1 and (top[:, 0] == top[0, 0]).all():
        warnings.append(f"every image is put in class {int(top[0, 0])}")
    missing = int((~present).sum())
    if missing:
        warnings.append(f"{missing} of {num_classes} classes have no image; they do not count in the mean recall")
    return EvaluationResult(
        task="zeroshot_classification",
        num_items=n,
        metrics=metrics,
        chance=chance,
        intervals=intervals,
        warnings=warnings,
        details={"per_class_recall": _per_class_recall(correct, total)},
    )


def _per_class_recall(correct: np.ndarray, total: np.ndarray) -> list[float | None]:
    return [float(c / t) if t else None for c, t in zip(correct, total, strict=True)]
