"""The per-item results that evaluators write (`NAME.npz`), and every score that follows from them."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_train.errors import IntegrityError, first_of
from clip_train.evaluation.group_audit.evaluator import MIN_RANKED
from clip_train.evaluation.reject.judge import KNOWN, MAIN_SCORE
from clip_train.evaluation.reject.metrics import METRICS
from clip_train.tools.compare.paired_bootstrap import (
    CalibrationError,
    GroupShares,
    MeanF1,
    Separation,
    Shares,
    Statistic,
)

Arrays = Mapping[str, np.ndarray]
_SHOWN = ("pair_", "picture")  # arrays about the pictures of the report only
MAX_SHOWN = 3  # items that a message names
SHOT_SEEDS = 3  # draws that a few-shot score is the mean of


class Scored(NamedTuple):
    """A score of several models on the same items."""

    statistic: Statistic
    right: np.ndarray | None  # [M, N] bool where each item is right or wrong, for McNemar's test


def read_items(path: Path) -> Arrays:
    """Read the per-item arrays of one evaluation.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} cannot be read as per-item results: {error}") from error


def align(models: Sequence[Arrays], *, names: Sequence[str]) -> tuple[list[Arrays], str]:
    """Return the arrays of all models in the order of the first one's items, and a remark on how they were paired.

    Args:
        models: the arrays of each.
        names: what to call them.

    Raises:
        ValueError: they have other items, with the difference named.
    """
    first, remark = models[0], ""
    aligned = [first]
    for model, name in zip(models[1:], names[1:], strict=True):
        _require_same_arrays(first, model, names=(names[0], name))
        for column in sorted(c for c in first.keys() | model.keys() if c == "key" or c.endswith("_key")):
            if column not in first or column not in model:
                remark = "paired by their order: not all results name their items"
                continue
            if column == "image_key" or np.array_equal(first[column], model[column]):
                continue
            _require_same_keys(first[column], model[column], names=(names[0], name))
            if column != "key" or "owner" in first:
                raise ValueError(f"{names[0]} and {name} have the same items in another order")
            model = _in_order(model, keys=first["key"])
        for column in ("label", "owner", "num_captions", "place"):
            if column in first and column in model and not np.array_equal(first[column], model[column]):
                raise ValueError(f"other items: `{column}` differs between {names[0]} and {name}")
        aligned.append(model)
    return aligned, remark


def scores_of(models: Sequence[Arrays], *, metrics: Collection[str]) -> dict[str, Scored]:
    """Return those of `metrics` that follow from the per-item arrays of several models."""
    ranks = sorted({int(metric.rpartition("@")[2]) for metric in metrics if "_recall@" in metric})
    parts = (_answers(models), _recalls(models, ranks=ranks), _choices(models), _cards(models), _separations(models),
             _confidences(models))  # fmt: skip
    return {metric: scored for part in parts for metric, scored in part if metric in metrics}


def _require_same_arrays(first: Arrays, second: Arrays, *, names: tuple[str, str]) -> None:
    for column in sorted(first.keys() & second.keys()):
        if len(first[column]) != len(second[column]) and not column.startswith(_SHOWN):
            sizes = (len(first[column]), len(second[column]))
            if "key" in first and "key" in second:
                _require_same_keys(first["key"], second["key"], names=names)
            raise ValueError(f"other items: {sizes[0]:,} in {names[0]}, {sizes[1]:,} in {names[1]}")


def _require_same_keys(first: np.ndarray, second: np.ndarray, *, names: tuple[str, str]) -> None:
    parts = []
    for own, other, name in ((first, second, names[0]), (second, first, names[1])):
        only = np.setdiff1d(own, other)
        if len(only):
            parts.append(f"{len(only):,} of {len(own):,} items only in {name} ({first_of(only, most=MAX_SHOWN)})")
    if not parts and len(first) != len(second):
        parts.append(f"{len(first):,} items in {names[0]}, {len(second):,} in {names[1]}")
    if parts:
        raise ValueError("other items: " + ", ".join(parts))
    if len(np.unique(first)) < len(first):
        raise ValueError(f"{names[0]} and {names[1]} have items of equal names in another order")


def _in_order(model: Arrays, *, keys: np.ndarray) -> Arrays:
    order = np.empty(len(keys), dtype=np.int64)
    order[np.argsort(keys)] = np.argsort(model["key"])
    return {name: values[order] if len(values) == len(keys) else values for name, values in model.items()}


def _stack(models: Sequence[Arrays], column: str) -> np.ndarray:
    return np.stack([model[column] for model in models])


def _share(right: np.ndarray, *, clusters: np.ndarray | None = None) -> Scored:
    ones = np.ones(right.shape[1], dtype=np.int64)
    return Scored(Shares.of([right.astype(np.int64)], [ones], clusters=clusters), right)


def _answers(models: Sequence[Arrays]) -> Iterator[tuple[str, Scored]]:
    """Classification, probes and audits: the likeliest classes and the right one."""
    first = models[0]
    if "top" not in first or first.get("label", np.zeros((1, 1))).ndim != 1:
        return
    labels, top = first["label"], _stack(models, "top")  # [N], [M, N, K]
    right, among = top[..., 0] == labels, (top == labels[:, None]).any(axis=-1)
    per_class = Scored(GroupShares.of(right, groups=labels, pool="mean"), None)
    for prefix in ("", "linear_"):
        yield f"{prefix}acc1", _share(right)
        yield f"{prefix}mean_per_class_recall", per_class
    yield "acc5", _share(among)
    yield "f1_macro", Scored(MeanF1.of(top[..., 0], labels=labels), None)
    for column in (name for name in first if name.endswith("_shot_hits")):
        hits = _stack(models, column)
        trials = np.full(hits.shape[1], SHOT_SEEDS)
        yield f"{column.removesuffix('_hits')}_acc1", Scored(Shares.of([hits], [trials]), None)
    for column in (name for name in first if name.startswith("group_")):
        yield from _groups(column.removeprefix("group_"), first[column], {"acc1": right, "acc5": among})


def _groups(name: str, of_item: np.ndarray, hits: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Scored]]:
    sizes = np.bincount(of_item[of_item >= 0], minlength=1)
    for least, ending in ((MIN_RANKED, ""), (1, "_any_size")):
        ranked = (of_item >= 0) & (sizes[of_item] >= least)
        if not ranked.any():
            continue
        for metric, right in hits.items():
            groups, right = of_item[ranked], right[:, ranked]
            yield f"{metric}_worst_{name}{ending}", Scored(GroupShares.of(right, groups=groups, pool="least"), None)
            if not ending:
                yield f"{metric}_gap_{name}", Scored(GroupShares.of(right, groups=groups, pool="gap"), None)


def _recalls(models: Sequence[Arrays], *, ranks: Sequence[int]) -> Iterator[tuple[str, Scored]]:
    """Retrieval: ranks of the right pictures by caption and of the right captions by picture."""
    first = models[0]
    for prefix in ("", "lenient_"):
        by_caption, by_picture = f"{prefix}image_twice_rank", f"{prefix}text_twice_rank"
        if by_caption not in first:
            continue
        captions, pictures = _stack(models, by_caption), _stack(models, by_picture)  # [M, T], [M, N]
        owner = first.get("owner", np.arange(captions.shape[1]))
        num = pictures.shape[1]
        if captions.shape[1] != len(owner) or owner.max() >= num:
            continue  # several captions a picture, written before results said whose they are
        own = np.bincount(owner, minlength=num)
        for k in ranks:
            found, hits = captions <= 2 * k, pictures <= 2 * k
            of_picture = np.stack([np.bincount(owner, right, minlength=num) for right in found])
            single = found[:, np.argsort(owner)] if (own == 1).all() else None
            yield f"{prefix}image_retrieval_recall@{k}", Scored(Shares.of([of_picture], [own]), single)
            yield f"{prefix}text_retrieval_recall@{k}", _share(hits)
            if k == 1:
                both = Shares.of([of_picture, hits.astype(np.int64)], [own, np.ones(num, dtype=np.int64)])
                yield f"{prefix}mean_recall@1", Scored(both, None)


def _choices(models: Sequence[Arrays]) -> Iterator[tuple[str, Scored]]:
    """Choices between captions or pictures; items that show one picture are drawn together."""
    first = models[0]
    clusters = np.unique(first["image_key"], return_inverse=True)[1] if "image_key" in first else None
    for metric in ("text_acc", "image_acc", "acc"):
        if metric in first:
            yield metric, _share(_stack(models, metric).astype(bool), clusters=clusters)
    if "jaccard" in first:
        shares = _stack(models, "jaccard")
        trials = np.ones(shares.shape[1], dtype=np.int64)
        yield "jaccard", Scored(Shares.of([shares], [trials], clusters=clusters), None)


def _cards(models: Sequence[Arrays]) -> Iterator[tuple[str, Scored]]:
    """The cards of a scorecard."""
    for column in (name for name in models[0] if name.startswith("right_")):
        yield column.removeprefix("right_"), _share(_stack(models, column))


def _separations(models: Sequence[Arrays]) -> Iterator[tuple[str, Scored]]:
    """Known pictures against all foreign ones."""
    ending = f"_{MAIN_SCORE.value}"
    sets = [name.removesuffix(ending) for name in models[0] if name.endswith(ending)]
    if KNOWN not in sets:
        return
    known = _stack(models, KNOWN + ending)
    foreign = np.concatenate([_stack(models, name + ending) for name in sets if name != KNOWN], axis=1)
    for metric in METRICS:
        yield metric, Scored(Separation.of(known, foreign, metric=metric), None)


def _confidences(models: Sequence[Arrays]) -> Iterator[tuple[str, Scored]]:
    """The calibration error before and after a temperature."""
    for when in ("before", "after"):
        if f"confidence_{when}" in models[0]:
            confidences, correct = _stack(models, f"confidence_{when}"), _stack(models, "correct")
            statistic = CalibrationError.of(confidences, correct, clusters=models[0].get("place"))
            yield f"ece_{when}", Scored(statistic, None)
