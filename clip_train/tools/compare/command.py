"""`clip-train compare`: the tables, the JSON, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from clip_train.evaluation.table import print_table
from clip_train.tools.compare.comparison import Comparison, Row, compare
from clip_train.tools.compare.describe import class_lines, p_value, remarks_of, seed_interval, verdict_of
from clip_train.tools.compare.page import write_comparison
from clip_train.tools.compare.sources import open_sides

MOST_KEYS = 20
_STYLES = {"better": "green", "worse": "bold red"}


def compare_command(given: Sequence[str], *, metrics: Sequence[str], html: Path | None, as_json: bool) -> None:
    """Compare the first of `given` with each other one and print what differs; write a page to `html`.

    Raises:
        UserError: there is nothing to compare, or the items differ.
        IntegrityError: result files are damaged.
    """
    first, *others = open_sides(given)
    comparisons = [compare(first, other, chosen=metrics) for other in others]
    if as_json:
        print(json.dumps([to_json(one) for one in comparisons], indent=2))
    else:
        for one in comparisons:
            print_comparison(one)
    if html is not None:
        write_comparison(html, comparisons=comparisons, sides=[first, *others])
        if not as_json:
            print(f"page: {html}")


def print_comparison(found: Comparison) -> None:
    """Print a comparison for a person."""
    print(f"{found.second} against {found.first}")
    for key, first, second in found.config[:MOST_KEYS]:
        print(f"  {key}: {first} -> {second}")
    if len(found.config) > MOST_KEYS:
        print(f"  … and {len(found.config) - MOST_KEYS} more keys, see --html or --json")
    if found.rows:
        print_table(_table(found))
    for name, changes in found.classes.items():
        for line in class_lines(changes):
            print(f"{name}: {line}")
    for remark in remarks_of(found):
        print(remark)


def to_json(found: Comparison) -> dict[str, Any]:
    """Return everything that a comparison has found."""
    return {
        "first": found.first,
        "second": found.second,
        "config": [difference._asdict() for difference in found.config],
        "metrics": [_row_to_json(row) for row in found.rows],
        "classes": {name: [change._asdict() for change in changes] for name, changes in found.classes.items()},
        "not_compared": found.refused,
        "only": found.only,
        "remarks": found.remarks,
    }


def _row_to_json(row: Row) -> dict[str, Any]:
    split = row.split
    return {
        "evaluation": row.evaluation, "metric": row.metric, "first": row.first, "second": row.second,
        "difference": row.difference, "interval": row.interval, "n": row.num_items, "verdict": row.verdict,
        "within_seed_spread": row.within_seed_spread,
        "mcnemar": {"p": split.p_value, **split._asdict()} if split else None,
        "seeds": asdict(row.seeds) if row.seeds else None,
    }  # fmt: skip


def _table(found: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    for heading in ("first %", "second %", "Δ points", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    with_split = any(row.split for row in found.rows)
    if with_split:
        table.add_column("McNemar p", justify="right", no_wrap=True)
    with_seeds = any(row.seeds for row in found.rows)
    if with_seeds:
        table.add_column("95 % over seeds", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    former = ""
    for row in found.rows:
        if row.evaluation != former:
            table.add_row(Text(row.evaluation, style="bold"))
        former = row.evaluation
        low_high = f"{100 * row.interval.low:+.2f} to {100 * row.interval.high:+.2f}" if row.interval else ""
        cells = [f"  {row.metric}", f"{100 * row.first:.2f}", f"{100 * row.second:.2f}"]
        cells += [f"{100 * row.difference:+.2f}", low_high, *([p_value(row)] if with_split else [])]
        cells += [seed_interval(row)] if with_seeds else []
        table.add_row(*cells, Text(verdict_of(row), style=_STYLES.get(row.verdict, "")))
    return table
