"""Score choices: what is right, what guessing would reach."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, factorial, prod

import numpy as np

from clip_train.evaluation.choose.choices import Choice, Kind
from clip_train.evaluation.confidence import bootstrap_ratio, wilson_interval
from clip_train.evaluation.result import EvaluationResult, Part

TASKS = {
    Kind.caption: "image_caption_selection",
    Kind.pairs: "image_caption_selection",
    Kind.pictures: "image_selection",
}
METRICS = {Kind.caption: ("text_acc",), Kind.pairs: ("text_acc", "image_acc", "acc"), Kind.pictures: ("jaccard",)}


def score(items: Sequence[Choice], cosines: Sequence[np.ndarray]) -> EvaluationResult:
    """Score items of one kind.

    Args:
        items: N of them.
        cosines: N arrays [pictures, captions] float32.
    """
    kind = items[0].kind
    answers = [_answer(item, cosine) for item, cosine in zip(items, cosines, strict=True)]
    values = {name: np.array([a[name] for a in answers]) for name in METRICS[kind]}
    chances = [_chance(item) for item in items]
    chance = {name: np.array([c[name] for c in chances]) for name in METRICS[kind]}
    everything = _part(values, chance, np.arange(len(items)))
    warnings = []
    if tied := sum(bool(a["tied"]) for a in answers):
        warnings.append(f"{tied} of {len(items)} items have a wrong answer exactly as near as a right one: not right")
    return EvaluationResult(
        task=TASKS[kind],
        num_items=len(items),
        metrics=everything.metrics,
        chance=everything.chance,
        intervals=everything.intervals,
        parts={tag: _part(values, chance, places) for tag, places in _places_by_tag(items).items()},
        warnings=warnings,
        details={"tied": tied},
        predictions={
            **values,
            "cosine": np.concatenate([cosine.ravel() for cosine in cosines]),
            "num_pictures": np.array([len(item.pictures) for item in items]),
            "num_captions": np.array([len(item.captions) for item in items]),
        },
    )


def _answer(item: Choice, cosine: np.ndarray) -> dict[str, bool | float]:
    """Return the item's value of each metric, and whether a wrong answer is exactly as near as a right one."""
    right = np.zeros(cosine.shape, dtype=bool)
    right[tuple(np.array(sorted(item.right)).T)] = True
    if item.kind is Kind.pictures:
        return _nearest_pictures(right[:, 0], cosine[:, 0])
    by_picture, by_caption = _compare(right, cosine), _compare(right.T, cosine.T)
    text, image = bool((by_picture > 0).all()), bool((by_caption > 0).all())
    tied = (by_picture == 0).any() or (item.kind is Kind.pairs and (by_caption == 0).any())
    return {"text_acc": text, "image_acc": image, "acc": text and image, "tied": bool(tied)}


def _compare(right: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return by how much the farthest right answer of each row is nearer than the nearest wrong one."""
    farthest = np.where(right, cosine, np.inf).min(axis=1)
    nearest_wrong = np.where(right, -np.inf, cosine).max(axis=1)
    return np.asarray(farthest - nearest_wrong)


def _nearest_pictures(right: np.ndarray, cosine: np.ndarray) -> dict[str, bool | float]:
    """Compare the right pictures with as many nearest ones; where the cut falls into a tie, with its wrong ones."""
    num_right = int(right.sum())
    # Wrong pictures come first among equal cosines, so that a tie never counts as right.
    order = np.lexsort((right, -cosine))
    found = int(right[order[:num_right]].sum())
    cut = cosine[order[num_right - 1]]
    tied = cosine[order[num_right]] == cut and len(set(right[cosine == cut].tolist())) == 2
    return {"jaccard": found / (2 * num_right - found), "tied": bool(tied)}


def _chance(item: Choice) -> dict[str, float]:
    """Return the mean of each metric if all cosines were drawn independently from one distribution."""
    num_pictures, num_captions = len(item.pictures), len(item.captions)
    if item.kind is Kind.pictures:
        k, wrong = len(item.right), num_pictures - len(item.right)
        ways = {found: comb(k, found) * comb(wrong, k - found) for found in range(k + 1)}
        return {"jaccard": sum(n * found / (2 * k - found) for found, n in ways.items()) / comb(num_pictures, k)}
    if item.kind is Kind.caption:
        return {"text_acc": 1 / comb(num_captions, len(item.right))}
    n = num_pictures
    # The group is right if every wrong pair is below both right ones that share its picture or caption. Integrating
    # over the right ones in ascending order, the k-th has 2(n - k) wrong ones below it that no lower one bounds.
    exponents = np.cumsum([2 * (n - k) + 1 for k in range(1, n + 1)])
    return {"text_acc": n**-n, "image_acc": n**-n, "acc": factorial(n) / prod(exponents.tolist())}


def _part(values: dict[str, np.ndarray], chance: dict[str, np.ndarray], places: np.ndarray) -> Part:
    one = np.ones(len(places))
    return Part(
        num_items=len(places),
        metrics={name: float(v[places].sum() / len(places)) for name, v in values.items()},
        chance={name: float(c[places].mean()) for name, c in chance.items()},
        intervals={
            name: bootstrap_ratio(v[places], one)
            if name == "jaccard"
            else wilson_interval(int(v[places].sum()), total=len(places))
            for name, v in values.items()
        },
    )


def _places_by_tag(items: Sequence[Choice]) -> dict[str, np.ndarray]:
    found: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        for tag in dict.fromkeys(item.tags):
            found.setdefault(tag, []).append(i)
    return {tag: np.array(places) for tag, places in found.items()}
