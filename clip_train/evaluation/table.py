"""Show results to a person."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_train.evaluation.result import EvaluationResult

FILE_WIDTH = 120
MOST_PARTS = 12  # tags that are printed; more are in the file only


def print_results(results: Mapping[str, EvaluationResult], *, console: Console | None = None) -> None:
    """Print scores in percent with their 95 % interval, the chance level and n; a collapsed result has no score.

    Args:
        results: by name of the evaluation.
        console: where to; standard output if None.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("evaluation", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("score %", "95 % interval", "chance %", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes, warnings = [], []
    for name, result in results.items():
        if result.collapsed:
            table.add_row(name, Text("collapsed", style="bold red"), "–", "–", "–", f"{result.num_items:,}")
            warnings.append(f"{name}: {result.collapsed}")
        for i, (metric, value) in enumerate(result.metrics.items()):
            interval = result.intervals.get(metric)
            table.add_row(
                name if i == 0 else "",
                metric,
                Text(f"{100 * value:.2f}", style="bold"),
                f"{100 * interval[0]:.2f} – {100 * interval[1]:.2f}" if interval else "",
                f"{100 * result.chance[metric]:.2f}" if metric in result.chance else "",
                f"{result.num_items:,}" if i == 0 else "",
            )
        if 1 < len(result.parts) <= MOST_PARTS:
            for tag, part in result.parts.items():
                for i, (metric, value) in enumerate(part.metrics.items()):
                    low, high = part.intervals[metric]
                    table.add_row(
                        f"  {tag}" if i == 0 else "",
                        metric,
                        f"{100 * value:.2f}",
                        f"{100 * low:.2f} – {100 * high:.2f}",
                        f"{100 * part.chance[metric]:.2f}",
                        f"{part.num_items:,}" if i == 0 else "",
                    )
        notes += [f"{name}: {note}" for note in result.notes]
        warnings += [f"{name}: {warning}" for warning in result.warnings]
    console = print_table(table, console=console)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for warning in warnings:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)


def print_table(table: Table, *, console: Console | None = None) -> Console:
    """Print a table to the console, to standard output if None, and return where it went."""
    if console is None:
        # A file or a pipe has no width: rich would break names at 80 columns.
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    return console
