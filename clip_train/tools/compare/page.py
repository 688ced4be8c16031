"""The page of a comparison: one self-contained file, as a run's report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_train.tools.charts import HEIGHT, WIDTH, Overlay, overlay_chart
from clip_train.tools.compare.comparison import ClassChange, Comparison, Row
from clip_train.tools.compare.describe import p_value, remarks_of, seed_interval, verdict_of
from clip_train.tools.compare.sources import Side
from clip_train.tools.pages import page_templates, write_page
from clip_train.tools.report import METRIC_NAMES
from clip_train.tools.report_evaluations import HEADLINE_METRICS

MOST_CLASSES = 12  # that gain, and that lose
_TRAINING: list[tuple[str, str, dict[str, Any]]] = [
    ("train/loss", "Loss", {"from_zero": True}),
    ("train/in_batch_recall@1", "Recall@1 in the batch", {"unit": "%", "from_zero": True}),
    ("perf/samples_per_second", "Samples per second", {"from_zero": True}),
]


class Span(NamedTuple):
    """Where a difference and its interval lie on the bar of the table, in percent of its width; 50 is no difference."""

    low: float
    high: float
    at: float


def write_comparison(path: Path, *, comparisons: Sequence[Comparison], sides: Sequence[Side]) -> None:
    """Write verdicts, differences, classes and overlaid curves of `sides` to `path`.

    Raises:
        UserError: the file cannot be written.
    """
    page = (
        page_templates()
        .get_template("compare.html.j2")
        .render(
            comparisons=comparisons,
            spans={one.second: spans_of(one.rows) for one in comparisons},
            remarks={one.second: remarks_of(one) for one in comparisons},
            classes={one.second: {n: _strongest(changes) for n, changes in one.classes.items()} for one in comparisons},
            charts=overlaid_curves(sides),
            colours={source.name: i for i, side in enumerate(sides) for source in side.sources},
            metric_names=METRIC_NAMES,
            p_value=p_value,
            seed_interval=seed_interval,
            verdict_of=verdict_of,
            written=time.strftime("%Y-%m-%d %H:%M"),
            box=(WIDTH, HEIGHT),
        )
    )
    write_page(path, page)


def spans_of(rows: Sequence[Row]) -> list[Span | None]:
    """Return the bars of a table's rows on one scale; None without an interval."""
    widest = max((abs(end) for row in rows if row.interval for end in row.interval), default=0.0) or 1.0

    def place(value: float) -> float:
        return round(50 + 50 * value / widest, 2)

    return [
        Span(place(r.interval.low), place(r.interval.high), place(r.difference)) if r.interval else None for r in rows
    ]


def overlaid_curves(sides: Sequence[Side]) -> list[Overlay]:
    """Return training and headline scores of all runs over samples seen, in the same axes."""
    runs = {source.name: source.rows for side in sides for source in side.sources}
    names = sorted({name for rows in runs.values() for row in rows for name in row})
    scores = [name for name in names if name.partition("/")[2] in HEADLINE_METRICS]
    kinds = [*_TRAINING, *((n, _title(n), {"unit": "%", "from_zero": True}) for n in scores)]
    drawn = [
        overlay_chart({run: _points(rows, key) for run, rows in runs.items()}, title=title, **how)
        for key, title, how in kinds
    ]
    return [chart for chart in drawn if chart]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(row["samples_seen"], row[key]) for row in rows if key in row]


def _title(name: str) -> str:
    evaluation, _, metric = name.partition("/")
    return f"{evaluation} · {METRIC_NAMES.get(metric, metric)}"


def _strongest(changes: Sequence[ClassChange]) -> list[ClassChange]:
    """Return the classes that gain or lose most, the largest gain first."""
    changed = [change for change in changes if change.gain]
    if len(changed) <= 2 * MOST_CLASSES:
        return changed
    return [*changed[:MOST_CLASSES], *changed[-MOST_CLASSES:]]
