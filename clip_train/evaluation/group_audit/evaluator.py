"""Compare a zero-shot classifier between groups of images, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from clip_train.distributed.collectives import gather_objects
from clip_train.errors import UserError, first_of
from clip_train.evaluation.classify.scores import NUM_TOP, metric_names, score
from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.confidence import wilson_interval
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    TokenizedTexts,
    encode_all_images,
    encode_texts,
    similarity,
    to_numpy,
    tokenize_texts,
)
from clip_train.evaluation.group_audit.measures import (
    bootstrap_gap,
    count_by_group,
    label_rates,
    max_skew,
    ndkl,
    strongest_associations,
)
from clip_train.evaluation.prompts.classifier import ClassPrompts, build_classifier, tokenize_prompts
from clip_train.evaluation.result import EvaluationResult, Part, item_keys

if TYPE_CHECKING:
    from clip_train.evaluation.classify.labelled_images import LabelledImages
    from clip_train.evaluation.group_audit.columns import GroupColumn

MIN_RANKED = 30
GROUPED = ("acc1", "acc5")  # metrics of which groups are compared
CAVEAT = "An audit finds differences between the groups it is given; it does not prove fairness."


class GroupAudit(Evaluator):
    """Accuracy of each group, the worst group, the gap, how often each label is given, and skew of retrieval.

    Groups with fewer than `MIN_RANKED` images are shown but not ranked; where there are such groups, `…_any_size`
    ranks all that have an image.

    Args:
        images: the labelled set, the same on every rank.
        columns: the ways to group it.
        queries: texts for retrieval; None takes the classes.
        skew_k: retrieved images that MaxSkew counts.
        setting: what it works with.
    """

    def __init__(
        self,
        images: LabelledImages,
        *,
        columns: Sequence[GroupColumn],
        queries: Sequence[str] | None = None,
        skew_k: int = 100,
        setting: Setting,
    ) -> None:
        super().__init__(setting)
        if images.multilabel:
            raise UserError("group_audit needs one class per image; this set has several")
        self.images, self.columns = images, columns
        self._queries, self._skew_k = queries, skew_k

    def metric_names(self) -> list[str]:
        """Return those of classification, and for each column those of its worst group and the gap."""
        names = metric_names(len(self.images.classnames))
        for column in self.columns:
            total = np.bincount(column.of_image[column.of_image >= 0], minlength=len(column.groups))
            endings = [ending for ending, _ in _rankings(total)]
            for metric in (one for one in GROUPED if one in names):
                names += [_worst(metric, column, ending) for ending in endings]
                names += [_gap(metric, column)] if "" in endings else []
        return names

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return the scores of all images, of every group in `parts`, and of the worst group of every column."""
        images = self.images
        classifier = build_classifier(model, self._prompts, world=self.world)
        features = encode_all_images(
            model, self.setting.read(images.source), num_images=len(images.source), world=self.world
        )
        # In pieces, since all cosines at once may not fit; a stable sort breaks ties to the lower class.
        top = np.concatenate(
            [
                to_numpy(classifier.cosines(rows).sort(dim=1, descending=True, stable=True)[1][:, :NUM_TOP])
                for rows in features.split(1024)
            ]
        )
        result = score(images.labels, top, num_classes=len(images.classnames), classnames=images.classnames)
        texts = (
            classifier.vectors if self._texts is None else encode_texts(model, self._texts, world=self.world).features
        )
        result.collapsed = collapsed_tower(image=features, text=texts)
        for column in self.columns if result.collapsed is None else ():
            _compare(result, column=column, hits=top == images.labels[:, None])
            result.details.setdefault("label_rate", {})[column.name] = self._labels(column, predicted=top[:, 0])
            result.details.setdefault("retrieval_skew", {})[column.name] = self._skew(column, texts, features, result)
        result.predictions = {"top": top, "label": images.labels, "key": item_keys(images.source)}
        result.predictions |= {f"group_{column.name}": column.of_image for column in self.columns}
        result.warnings += images.warnings
        result.notes.append(CAVEAT)
        return result

    @cached_property
    def _prompts(self) -> ClassPrompts:
        images = self.images
        return tokenize_prompts(self.setting.tokenizer, classnames=images.classnames, templates=images.templates)

    @cached_property
    def _texts(self) -> TokenizedTexts | None:
        return None if self._queries is None else tokenize_texts(self.setting.tokenizer, self._queries)

    def _labels(self, column: GroupColumn, *, predicted: np.ndarray) -> dict[str, Any]:
        names = list(self.images.classnames)
        rates = label_rates(column.of_image, predicted, num_groups=len(column.groups), num_classes=len(names))
        ranked = np.flatnonzero(np.bincount(column.of_image[column.of_image >= 0]) >= MIN_RANKED)
        return {
            "rates": {group: rates[g].round(6).tolist() for g, group in enumerate(column.groups)},
            "largest_differences": strongest_associations(
                rates[ranked], groups=[column.groups[g] for g in ranked], classnames=names
            )
            if len(ranked) > 1
            else [],
        }

    def _skew(
        self, column: GroupColumn, texts: Tensor, features: Tensor, result: EvaluationResult
    ) -> dict[str, float | int | None]:
        """Return skew of the retrieved images, the mean over the texts; each rank searches for its share of these."""
        grouped = np.flatnonzero(column.of_image >= 0)
        groups = column.of_image[grouped]
        share = np.bincount(groups, minlength=len(column.groups)) / len(groups)
        large = np.bincount(groups, minlength=len(column.groups)) >= MIN_RANKED
        gallery = features[grouped]
        k = self._skew_k if self._skew_k <= len(groups) else None
        own = []
        for text in texts[self.world.rank :: self.world.size]:
            order = to_numpy(similarity(text[None], gallery)[0].argsort(descending=True, stable=True))
            ranked = groups[order]
            skew = max_skew(ranked, share=np.where(large, share, 0), k=k) if k and large[ranked[:k]].any() else None
            own.append((skew, ndkl(ranked, share=share)))
        everyone = [pair for pairs in gather_objects(own, world=self.world) for pair in pairs]
        skews = sorted(skew for skew, _ in everyone if skew is not None)  # sorted: one sum on any number of ranks
        divergence = sum(sorted(value for _, value in everyone)) / len(everyone)
        mean = sum(skews) / len(skews) if skews else None
        told = f"MaxSkew@{k} {mean:.3f}, " if mean is not None else ""
        result.notes.append(
            f"{column.name}: retrieval by {len(texts):,} texts has {told}NDKL {divergence:.4f} (0: as in the set)"
        )
        return {"texts": len(texts), "k": k, "max_skew": mean, "ndkl": divergence}


def _compare(result: EvaluationResult, *, column: GroupColumn, hits: np.ndarray) -> None:
    """Add the scores of a column's groups and of its worst group.

    Args:
        result: of all images.
        column: which images belong together.
        hits: [N, K] whether the k-th likeliest class is right.
    """
    num_groups = len(column.groups)
    for metric, right in zip(GROUPED, (hits[:, 0], np.asarray(hits.any(axis=1))), strict=True):
        if metric not in result.metrics:
            continue
        correct, total = count_by_group(column.of_image, right, num_groups=num_groups)
        for ending, ranked in _rankings(total):
            accuracy = correct[ranked] / total[ranked]
            worst = np.flatnonzero(ranked)[accuracy.argmin()]
            name = _worst(metric, column, ending)
            result.metrics[name] = float(accuracy.min())
            result.intervals[name] = wilson_interval(int(correct[worst]), total=int(total[worst]))
            result.chance[name] = result.chance[metric]
            if not ending:
                name = _gap(metric, column)
                result.metrics[name] = float(accuracy.max() - accuracy.min())
                result.intervals[name] = bootstrap_gap(correct[ranked], total[ranked])
                result.chance[name] = 0.0
        for g in np.flatnonzero(total):
            interval = wilson_interval(int(correct[g]), total=int(total[g]))
            part = result.parts.setdefault(
                f"{column.name}={column.groups[g]}", Part(num_items=int(total[g]), metrics={}, chance={}, intervals={})
            )
            part.metrics[metric], part.intervals[metric] = int(correct[g]) / int(total[g]), interval
            part.chance[metric] = result.chance[metric]
    _tell(result, column=column)


def _rankings(total: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the ending of a ranking's metrics and which groups [G] bool it ranks, of groups of `total` [G] images."""
    large, any_size = total >= MIN_RANKED, total > 0
    rankings = [("", large)] if (large == any_size).all() else [("", large), ("_any_size", any_size)]
    return [(ending, ranked) for ending, ranked in rankings if ranked.sum() >= 2]


def _worst(metric: str, column: GroupColumn, ending: str) -> str:
    return f"{metric}_worst_{column.name}{ending}"


def _gap(metric: str, column: GroupColumn) -> str:
    return f"{metric}_gap_{column.name}"


def _tell(result: EvaluationResult, *, column: GroupColumn) -> None:
    total = np.bincount(column.of_image[column.of_image >= 0], minlength=len(column.groups))
    ranked = [column.groups[g] for g in np.flatnonzero(total >= MIN_RANKED)]
    small = [column.groups[g] for g in np.flatnonzero(total < MIN_RANKED)]
    without = int((column.of_image < 0).sum())
    if len(ranked) > 1:
        worst = min(ranked, key=lambda group: result.parts[f"{column.name}={group}"].metrics["acc1"])
        result.details.setdefault("worst_group", {})[column.name] = worst
        result.notes.append(f"{column.name}: the worst of {len(ranked)} groups is {worst}")
    if small:
        listed = first_of(small)
        result.warnings.append(f"{column.name}: not ranked, with fewer than {MIN_RANKED} images: {listed}")
    if without:
        result.warnings.append(f"{column.name}: {without:,} images belong to no group")
