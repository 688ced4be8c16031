"""Compare one side with another: every score with its difference, the interval of that and a verdict."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_train.errors import IntegrityError, UserError, first_of
from clip_train.evaluation.result import LOWER_IS_BETTER, read_result
from clip_train.tools.compare.items import Arrays, Scored, align, read_items, scores_of
from clip_train.tools.compare.paired_bootstrap import (
    Discordant,
    Interval,
    difference_interval,
    discordant,
    point,
    resample,
)
from clip_train.tools.compare.seeds import Seeds, welch
from clip_train.tools.compare.sources import Side, Source, choose_results

SEED_SPREAD = 0.002
"""What training seeds alone may change, as a share: about 0.2 points (Gadre et al. 2023, DataComp)."""
SIGNIFICANT = 0.05
NOT_A_DIFFERENCE = ("name", "run_dir", "resume")
MOST_KEYS = 3  # that a remark names
_TOLERANCE = 1e-9
_ABSENT = "absent"


class ConfigDifference(NamedTuple):
    """A key whose value differs."""

    key: str
    first: str
    second: str


class ClassChange(NamedTuple):
    """Items of a class that each side answers rightly; the mean over a side's seeds."""

    name: str
    num_items: int
    first: float
    second: float

    @property
    def gain(self) -> float:
        """Second minus first."""
        return self.second - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One score of both sides."""

    evaluation: str
    metric: str
    first: float
    second: float
    num_items: int
    interval: Interval | None = None
    """95 % of the difference over the choice of items; None without per-item results."""
    split: Discordant | None = None
    """Items that only one side answers rightly; None where items are not just right or wrong, or with seeds."""
    seeds: Seeds | None = None
    """The difference over the choice of seeds, with several on both sides."""

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """What the difference means, in words."""
        if self.interval is None:
            return "no per-item results: not tested"
        low, high = self.interval
        shown = low > 0 or high < 0
        if self.split is not None:
            shown = shown and self.split.p_value < SIGNIFICANT
        if self.seeds is not None:
            shown = shown and self.seeds.show_difference
        if not shown:
            return f"no difference shown at n={self.num_items:,}"
        return "better" if (self.difference > 0) != is_error(self.metric) else "worse"

    @property
    def within_seed_spread(self) -> bool:
        """Whether training the same recipe again may change as much, and it has not been measured whether it does."""
        return self.seeds is None and self.interval is not None and 0 < abs(self.difference) < SEED_SPREAD


@dataclass(slots=True, kw_only=True)
class Comparison:
    """A side measured against another."""

    first: str
    second: str
    config: list[ConfigDifference]
    rows: list[Row] = field(default_factory=list)
    classes: dict[str, list[ClassChange]] = field(default_factory=dict)
    """By evaluation, the largest gains first."""
    refused: dict[str, str] = field(default_factory=dict)
    """Evaluations that cannot be compared, and why."""
    remarks: list[str] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=dict)
    """Evaluations that only one side has, by its name."""


def is_error(metric: str) -> bool:
    """Return whether less is better."""
    return metric in LOWER_IS_BETTER or "_gap_" in metric


def compare(first: Side, second: Side, *, chosen: Collection[str] = ()) -> Comparison:
    """Compare everything that both sides have been evaluated on.

    Args:
        first: what is compared with.
        second: what is judged.
        chosen: metrics (`imagenet/acc1`, `acc1`) or evaluations (`imagenet`); empty: all.

    Raises:
        UserError: there is nothing to compare, or `chosen` names what is not there.
        IntegrityError: result files are damaged or do not belong together.
    """
    sources = [*first.sources, *second.sources]
    found = Comparison(first=first.name, second=second.name, config=config_differences(sources[0], second.sources[0]))
    shared = [name for name in sources[0].results if all(name in source.results for source in sources)]
    for side in (first, second):
        found.remarks += _other_than_seeds(side)
        names = {name for source in side.sources for name in source.results}
        if missing := sorted(names - set(shared)):
            found.only[side.name] = missing
    for name in shared:
        results = choose_results(sources, evaluation=name)
        contents = [read_result(result.path) for result in results]
        try:
            models = _read_models([result.path for result in results], contents, names=[s.name for s in sources])
            aligned, remark = align(models, names=[s.name for s in sources]) if models else ([], "")
        except ValueError as error:
            found.refused[name] = str(error)
            continue
        metrics = [m for m in contents[0]["metrics"] if _is_chosen(name, m, chosen)]
        if not metrics:
            continue
        if remark:
            found.remarks.append(f"{name}: {remark}")
        found.rows += _rows(name, metrics, contents, aligned, num_first=len(first.sources), results=results)
        if aligned and "label" in aligned[0] and "top" in aligned[0] and aligned[0]["label"].ndim == 1:
            found.classes[name] = class_changes(
                aligned, names=_class_names(results[0].path), num_first=len(first.sources)
            )
    _require_something(found, chosen=chosen)
    return found


def config_differences(first: Source, second: Source) -> list[ConfigDifference]:
    """Return the config keys whose values differ; names and folders of the runs do not count."""
    if not first.config or not second.config:
        return []
    keys = sorted(first.config.keys() | second.config.keys())
    both = [(key, *(str(config.get(key, _ABSENT)) for config in (first.config, second.config))) for key in keys]
    return [ConfigDifference(key, a, b) for key, a, b in both if a != b and key not in NOT_A_DIFFERENCE]


def _other_than_seeds(side: Side) -> list[str]:
    """Say in what the runs of a side differ besides their seed."""
    return [
        f"{source.name} is no other seed of {side.sources[0].name}'s recipe: {keys}"
        for source in side.sources[1:]
        if source.config and side.sources[0].config
        if (keys := _recipe_difference(side.sources[0], source))
    ]


def _recipe_difference(first: Source, second: Source) -> str:
    differences = config_differences(first, second)
    if not differences:
        return f"seed: {first.config.get('seed')} for both"
    return first_of((f"{key}: {a} -> {b}" for key, a, b in differences if key != "seed"), most=MOST_KEYS)


def class_changes(models: Sequence[Arrays], *, names: Mapping[int, str], num_first: int) -> list[ClassChange]:
    """Return how many items of each class either side answers rightly, the largest gain first."""
    labels = models[0]["label"]
    total = np.bincount(labels)
    right = np.stack([np.bincount(labels[m["top"][:, 0] == labels], minlength=len(total)) for m in models])
    first, second = right[:num_first].mean(axis=0), right[num_first:].mean(axis=0)
    changes = [
        ClassChange(names.get(int(c), str(c)), int(total[c]), float(first[c]), float(second[c]))
        for c in np.flatnonzero(total)
    ]
    return sorted(changes, key=lambda change: (-change.gain, change.name))


def _read_models(paths: Sequence[Path], contents: Sequence[Mapping[str, Any]], *, names: Sequence[str]) -> list[Arrays]:
    """Return the per-item arrays of all models, nothing if one has none."""
    for content, name in zip(contents, names, strict=True):
        extras = content.get("clip_train", {})
        if extras.get("status") == "collapsed":
            raise ValueError(f"{name} has collapsed: {extras.get('reason')}")
    files = [path.with_suffix(".npz") for path in paths]
    return [read_items(file) for file in files] if all(file.is_file() for file in files) else []


def _rows(
    evaluation: str, metrics: Sequence[str], contents: Sequence[Mapping[str, Any]], models: Sequence[Arrays], *,
    num_first: int, results: Sequence[Any],
) -> list[Row]:  # fmt: skip
    scored = scores_of(models, metrics=metrics) if models else {}
    rows = []
    for metric in metrics:
        values = [content["metrics"].get(metric) for content in contents]
        if any(value is None for value in values):
            continue
        own = np.array(values, dtype=np.float64)
        num_items = int(contents[0].get("clip_train", {}).get("n") or 0)
        first, second = own[:num_first], own[num_first:]
        rows.append(
            Row(
                evaluation=evaluation, metric=metric, first=float(first.mean()), second=float(second.mean()),
                num_items=num_items,
                seeds=welch(first, second) if min(len(first), len(second)) > 1 else None,
                **_tested(scored.get(metric), own, num_first=num_first, results=results, metric=metric),
            )
        )  # fmt: skip
    return rows


def _tested(
    scored: Scored | None, values: np.ndarray, *, num_first: int, results: Sequence[Any], metric: str
) -> dict[str, Any]:
    if scored is None:
        return {}
    for result, told, own in zip(results, values, point(scored.statistic), strict=True):
        if abs(told - own) > _TOLERANCE:
            raise IntegrityError(
                f"{result.path} says {metric} {told:.6f}, its per-item results {own:.6f}: they do not belong together"
            )
    drawn = resample(scored.statistic)
    interval = difference_interval(drawn[:, num_first:].mean(axis=1) - drawn[:, :num_first].mean(axis=1))
    single = scored.right is not None and len(scored.right) == 2
    split = discordant(*scored.right) if scored.right is not None and single else None
    return {"interval": interval, "split": split}


def _is_chosen(evaluation: str, metric: str, chosen: Collection[str]) -> bool:
    return not chosen or bool({evaluation, metric, f"{evaluation}/{metric}"} & set(chosen))


def _require_something(found: Comparison, *, chosen: Collection[str]) -> None:
    if found.rows:
        return
    if found.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused.items())
        raise UserError(f"{found.first} and {found.second} cannot be compared: {reasons}")
    if chosen:
        raise UserError(f"--metric {' '.join(chosen)}: {found.first} and {found.second} do not both have it")


def _class_names(path: Path) -> dict[int, str]:
    table = path.with_suffix(".classes.csv")
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {int(row["class"]): row["name"] for row in csv.DictReader(file)}
