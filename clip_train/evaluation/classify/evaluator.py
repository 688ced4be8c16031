"""Zero-shot classification on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.classify.multilabel import MULTILABEL_METRIC, score_multilabel
from clip_train.evaluation.classify.permutation import probable_permutation
from clip_train.evaluation.classify.scores import NUM_TOP, metric_names, score
from clip_train.evaluation.collapse import TowerStatistics
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    encode_images,
    gather_items,
    to_numpy,
)
from clip_train.evaluation.prompts.classifier import (
    ClassPrompts,
    ZeroShotClassifier,
    build_ensembles,
    tokenize_prompts,
)
from clip_train.evaluation.prompts.files import load_templates, prompts_sha256
from clip_train.evaluation.result import EvaluationResult, evenly_spaced, item_keys
from clip_train.evaluation.samples import NUM_PICTURES, PictureAnswers, ReportSamples, read_pictures

if TYPE_CHECKING:
    from clip_train.evaluation.classify.labelled_images import LabelledImages

ABLATIONS = ("simple", "single")


class Classify(Evaluator):
    """Accuracy among all classes of a labelled set: acc1, acc5 (from five classes on), mean per-class recall and F1.

    Where an image may belong to several classes, the mean average precision. Templates that hold OpenAI's seven or the
    single one are also scored with only these: the template ablation.

    Args:
        images: the labelled set, the same on every rank.
        setting: what it works with.
    """

    def __init__(self, images: LabelledImages, *, setting: Setting) -> None:
        super().__init__(setting)
        self.images = images

    def metric_names(self) -> list[str]:
        """Return those of one class per image, or of several."""
        return [MULTILABEL_METRIC] if self.images.multilabel else metric_names(len(self.images.classnames))

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and the likeliest classes of every image."""
        images = self.images
        ensembles = build_ensembles(model, self._prompts, world=self.world, parts=list(self._ablations.values()))
        found, collapsed = self._predict(model, ensembles)
        names = list(images.classnames)
        if images.multilabel:
            result = score_multilabel(images.labels, found.pop("all_cosines"), classnames=names)
        else:
            result = score(images.labels, found["top"], num_classes=len(names), classnames=names)
            if warning := probable_permutation(images.labels, found["top"][:, 0], classnames=names):
                result.warnings.append(warning)
            if self._ablations:
                result.details["template_ablation"] = {
                    name: float((found.pop(f"top_{name}") == images.labels).mean()) for name in self._ablations
                }
        result.predictions = {**found, "label": images.labels, "key": item_keys(images.source)}
        result.collapsed = collapsed
        result.warnings += images.warnings
        result.details |= {
            "templates": max(self._prompts.counts),
            "classes": len(names),
            "prompts_sha256": prompts_sha256(names, templates=images.templates),
        }
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples:
        """Return evenly spaced pictures with their likeliest classes."""
        images = self.images
        chosen = evenly_spaced(result.num_items, count=NUM_PICTURES)
        answers = []
        for i in chosen:
            top = result.predictions["top"][i]
            truth = (np.flatnonzero(images.labels[i]) if images.multilabel else images.labels[i : i + 1]).tolist()
            answers.append(
                PictureAnswers(
                    truth=[images.classnames[c] for c in truth],
                    answers=[images.classnames[c] for c in top],
                    cosines=[round(float(c), 4) for c in result.predictions["cosine"][i]],
                    right=bool(top[0] in truth),
                )
            )
        return ReportSamples(pictures=read_pictures(images.source, chosen, size=size), answers=answers)

    @cached_property
    def _prompts(self) -> ClassPrompts:
        # ImageNet has 80,000: once per run, not once per evaluation.
        return tokenize_prompts(
            self.setting.tokenizer, classnames=self.images.classnames, templates=self.images.templates
        )  # fmt: skip

    @cached_property
    def _ablations(self) -> dict[str, list[int]]:
        """Places of those of our templates that a shorter published list has too, if it is a part of ours."""
        own = self.images.templates
        if isinstance(own, Mapping) or self.images.multilabel:
            return {}
        parts = {name: load_templates(name) for name in ABLATIONS}
        place = {template.replace("{c}", "{}"): i for i, template in enumerate(own)}
        return {
            name: [place[template] for template in part]
            for name, part in parts.items()
            if len(part) < len(own) and all(template in place for template in part)
        }

    def _predict(
        self, model: DualEncoder, ensembles: Sequence[ZeroShotClassifier]
    ) -> tuple[dict[str, np.ndarray], str | None]:
        """Return columns in index order, and why a tower counts as collapsed.

        `top` [N, K] and its `cosine` [N, K]; `top_NAME` [N] of each ablation; with several labels per image also
        `all_cosines` [N, C].
        """
        classifier, *ablations = ensembles
        embed_dim = classifier.vectors.shape[1]
        statistics = TowerStatistics(embed_dim=embed_dim, world=self.world)
        indices, valids, batches = [], [], []
        for features, index, valid in encode_images(model, self.setting.read(self.images.source), world=self.world):
            statistics.add(features[valid], numbers=index[valid])
            cosines = classifier.cosines(features)
            # A stable sort breaks ties to the lower class.
            cosine, top = cosines.sort(dim=1, descending=True, stable=True)
            columns = {"top": top[:, :NUM_TOP], "cosine": cosine[:, :NUM_TOP]}
            if self.images.multilabel:
                columns["all_cosines"] = cosines
            for name, ablation in zip(self._ablations, ablations, strict=True):
                columns[f"top_{name}"] = ablation.cosines(features).sort(dim=1, descending=True, stable=True)[1][:, 0]
            indices.append(index)
            valids.append(valid)
            batches.append(columns)
        statistics.reduce()
        gathered = gather_items(
            torch.cat(indices),
            {name: torch.cat([columns[name] for columns in batches]) for name in batches[0]},
            valid=torch.cat(valids),
            num_items=len(self.images.labels),
            world=self.world,
        )
        text_statistics = TowerStatistics(embed_dim=embed_dim, world=World(device=self.world.device))
        text_statistics.add(classifier.vectors)
        collapsed = statistics.reason("image") or text_statistics.reason("text")
        return {name: to_numpy(column) for name, column in gathered.items()}, collapsed
