"""A suite: many evaluations at once, of which those are run whose data are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from clip_train.errors import UserError
from clip_train.evaluation.result import read_result
from clip_train.evaluation.table import print_table

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.evaluation.config import EvaluationConfig

AVERAGE = "average"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScore:
    """What one set of a suite came to."""

    name: str
    metric: str
    """The one that counts, as `benchmark.metric` names it."""
    score: float | None
    """None: the set was not run, or the model has no such score."""
    interval: tuple[float, float] | None = None
    chance: float | None = None
    """As published for the set, else the evaluator's own."""
    normalised: float | None = None
    """(score - chance) / (1 - chance)."""
    num_items: int | None = None
    remark: str = ""
    """Why there is no score, or in what the set differs from the published one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean score of some sets of a suite. It is the suite's own score only if it is over all of them."""

    score: float
    over: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What a suite came to."""

    suite: str
    sets: list[SetScore]
    """All sets of the suite, run or not."""
    means: dict[str, Mean]
    """By name of the mean, `average` last; a mean without any score is left out."""

    def table(self) -> Table:
        """Return the sets that were run, for a person."""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column(self.suite, overflow="fold")
        table.add_column("metric", overflow="fold")
        for heading in ("score %", "chance %", "n"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for one in self.sets:
            if one.num_items is None:
                continue
            table.add_row(
                one.name,
                one.metric,
                "–" if one.score is None else f"{100 * one.score:.2f}",
                "" if one.chance is None else f"{100 * one.chance:.2f}",
                f"{one.num_items:,}",
                one.remark,
            )
        return table

    def lines(self) -> list[str]:
        """Return the means for a person, each with the number of its sets that it is over, and the sets not run."""
        means = [
            f"{self.suite}: {name} {100 * mean.score:.2f} % over {mean.over}/{mean.of}"
            for name, mean in self.means.items()
        ]
        return [*means, *(f"{self.suite}: {one.name} is {one.remark}" for one in self.sets if one.num_items is None)]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def require_some(evaluations: Mapping[str, EvaluationConfig], *, suite: str) -> dict[str, str]:
    """Return the sets that are not there, with the place where each was looked for.

    Raises:
        UserError: none of them is there.
    """
    places = {name: one.missing() for name, one in evaluations.items()}
    missing = {name: place for name, place in places.items() if place is not None}
    if len(missing) == len(evaluations):
        raise UserError(f"suite={suite}: none of its sets is there: {', '.join(missing.values())}")
    return missing


def report_suite(
    suite: str, *, evaluations: Mapping[str, EvaluationConfig], missing: Mapping[str, str], folder: Path
) -> None:  # fmt: skip
    """Print the table and the means of a suite, and write `suite-NAME.json` and `results.jsonl`.

    Args:
        suite: its name.
        evaluations: all sets of the suite.
        missing: those that were not run, with the place where they were looked for.
        folder: holds the results of the others, and gets the files.
    """
    results = {name: read_result(folder / f"{name}.json") for name in evaluations if name not in missing}
    summary = summarize(results, suite=suite, evaluations=evaluations, missing=missing)
    summary.write(folder / f"suite-{suite}.json")
    write_lines(folder / "results.jsonl", results, suite=summary, evaluations=evaluations)
    print_table(summary.table())
    print("\n".join(summary.lines()))


def summarize(
    results: Mapping[str, Mapping[str, Any]],
    *,
    suite: str,
    evaluations: Mapping[str, EvaluationConfig],
    missing: Mapping[str, str],
) -> SuiteResult:
    """Pick the metric of every set that counts, and average them.

    Args:
        results: by name of the evaluation, as `read_result` gives them.
        suite: its name.
        evaluations: all sets of the suite.
        missing: those that were not run, with the place where they were looked for.
    """
    sets = [
        SetScore(
            name=name,
            metric=one.benchmark.metric or "",
            score=None,
            remark=f"not there: {missing[name]}",
        )
        if name in missing
        else _score_of(results[name], name=name, config=one)
        for name, one in evaluations.items()
    ]
    groups: dict[str, list[SetScore]] = {}
    for one in sets:
        for group in evaluations[one.name].benchmark.part_of:
            groups.setdefault(group, []).append(one)
    groups[AVERAGE] = [one for one in sets if one.metric]
    return SuiteResult(
        suite=suite,
        sets=sets,
        means={name: mean for name, members in groups.items() if (mean := _mean(members)) is not None},
    )


def write_lines(
    path: Path,
    results: Mapping[str, Mapping[str, Any]],
    *,
    suite: SuiteResult,
    evaluations: Mapping[str, EvaluationConfig],
) -> None:
    """Write `results.jsonl` as DataComp's tools read it: one set per line, its metrics with the one that counts."""
    scores = {one.name: one.score for one in suite.sets}
    lines = []
    for name, result in results.items():
        published = evaluations[name].benchmark
        metrics = {**result["metrics"], "main_metric": scores[name]}
        line = {"key": published.task or name, "dataset": published.title or name, "metrics": metrics}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _score_of(result: Mapping[str, Any], *, name: str, config: EvaluationConfig) -> SetScore:
    published, extras = config.benchmark, result["clip_train"]
    metric = published.metric or ""
    part, _, plain = metric.rpartition("/")
    scores = extras.get("parts", {}).get(part, {"metrics": {}, "chance": {}, "intervals": {}}) if part else extras
    score = (scores["metrics"] if part else result["metrics"]).get(plain)
    chance = scores["chance"].get(plain) if published.chance is None else published.chance
    remarks = [f"collapsed: {extras['reason']}"] if extras["status"] == "collapsed" else []
    if score is None and metric and not remarks:
        remarks.append(f"not counted: it has no {metric}")
    for what, found, expected in (
        ("images", extras["n"], published.images), ("classes", extras.get("classes"), published.classes),
    ):  # fmt: skip
        if expected is not None and found != expected:
            remarks.append(f"{found:,} {what}, {expected:,} published")
    return SetScore(
        name=name,
        metric=metric,
        score=score,
        interval=scores["intervals"].get(plain),
        chance=chance,
        normalised=None if score is None or chance is None or chance >= 1 else (score - chance) / (1 - chance),
        num_items=extras["n"],
        remark="; ".join(remarks),
    )


def _mean(sets: Sequence[SetScore]) -> Mean | None:
    scores = [one.score for one in sets if one.score is not None]
    return Mean(score=sum(scores) / len(scores), over=len(scores), of=len(sets)) if scores else None
