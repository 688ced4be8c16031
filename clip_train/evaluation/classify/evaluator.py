"""Zero-shot classification on all ranks."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.collapse import TowerStatistics
from clip_train.evaluation.confidence import bootstrap_mean_per_class, wilson_interval
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    TokenizedTexts,
    encode_images,
    gather_items,
    to_numpy,
)
from clip_train.evaluation.prompts.classifier import ZeroShotClassifier, build_classifier, tokenize_prompts
from clip_train.evaluation.result import EvaluationResult, evenly_spaced
from clip_train.evaluation.samples import NUM_PICTURES, PictureAnswers, ReportSamples, read_pictures

if TYPE_CHECKING:
    from clip_train.evaluation.classify.labelled_images import LabelledImages

NUM_TOP = 5


class Classify(Evaluator):
    """Accuracy among all classes of a labelled set: acc1, acc5 (from five classes on) and mean per-class recall.

    Args:
        images: the labelled set, the same on every rank.
        setting: what it works with.
    """

    def __init__(self, images: LabelledImages, *, setting: Setting) -> None:
        super().__init__(setting)
        self.images = images

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and the five likeliest classes of every image."""
        images = self.images
        classifier = build_classifier(model, self._prompts, classnames=images.classnames, world=self.world)
        predictions, collapsed = self._predict(model, classifier)
        predictions["label"] = images.labels
        result = score(images.labels, predictions["top"], num_classes=len(images.classnames))
        result.predictions, result.collapsed = predictions, collapsed
        result.details |= {"templates": len(images.templates), "classes": len(images.classnames)}
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples:
        """Return evenly spaced pictures with their likeliest classes."""
        images = self.images
        chosen = evenly_spaced(result.num_items, count=NUM_PICTURES)
        answers = [
            PictureAnswers(
                truth=[images.classnames[images.labels[i]]],
                answers=[images.classnames[c] for c in result.predictions["top"][i]],
                cosines=[round(float(c), 4) for c in result.predictions["cosine"][i]],
                right=bool(result.predictions["top"][i][0] == images.labels[i]),
            )
            for i in chosen
        ]
        return ReportSamples(pictures=read_pictures(images.source, chosen, size=size), answers=answers)

    @cached_property
    def _prompts(self) -> TokenizedTexts:
        # ImageNet has 80,000: once per run, not once per evaluation.
        return tokenize_prompts(
            self.setting.tokenizer, classnames=self.images.classnames, templates=self.images.templates
        )  # fmt: skip

    def _predict(self, model: DualEncoder, classifier: ZeroShotClassifier) -> tuple[dict[str, np.ndarray], str | None]:
        """Return `top` [N, K] and its `cosine` [N, K], in index order, and why a tower counts as collapsed."""
        embed_dim = classifier.vectors.shape[1]
        statistics = TowerStatistics(embed_dim=embed_dim, world=self.world)
        indices, valids, tops, cosines = [], [], [], []
        for features, index, valid in encode_images(model, self.setting.read(self.images.source), world=self.world):
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
            world=self.world,
        )
        text_statistics = TowerStatistics(embed_dim=embed_dim, world=World(device=self.world.device))
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
