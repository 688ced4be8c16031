"""Show results to a person."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_train.evaluation.result import EvaluationResult, Part

FILE_WIDTH = 120
PITFALL = "pitfall"  # how a bad verdict begins
MOST_PARTS = 12  # tags that are printed; more are in the file only


def print_results(results: Mapping[str, EvaluationResult], *, console: Console | None = None) -> None:
    """Print scores in percent with their 95 % interval, the chance level and n; a collapsed result has no score.

    Results with verdicts, such as a scorecard, follow in tables of their own.

    Args:
        results: by name of the evaluation.
        console: where to; standard output if None.
    """
    judged = {name: result for name, result in results.items() if result.verdicts}
    plain = {name: result for name, result in results.items() if name not in judged}
    for group in ([plain] if plain else []) + [{name: result} for name, result in judged.items()]:
        console = print_table(_table(group), console=console)
        for name, result in group.items():
            for note in result.notes:
                console.print(f"{name}: {note}", markup=False, highlight=False, soft_wrap=True)
        for name, result in group.items():
            for warning in [*([result.collapsed] if result.collapsed else []), *result.warnings]:
                console.print(f"{name}: {warning}", style="yellow", markup=False, soft_wrap=True)


def print_table(table: Table, *, console: Console | None = None) -> Console:
    """Print a table to the console, to standard output if None, and return where it went."""
    if console is None:
        # A file or a pipe has no width: rich would break names at 80 columns.
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    return console


def _table(results: Mapping[str, EvaluationResult]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("evaluation", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("score %", "95 % interval", "chance %", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(result.verdicts for result in results.values()):
        table.add_column("verdict", overflow="fold")
    for name, result in results.items():
        if result.collapsed:
            table.add_row(name, Text("collapsed", style="bold red"), "–", "–", "–", f"{result.num_items:,}")
        _add_scores(table, name, result, style="bold", verdicts=result.verdicts)
        if 1 < len(result.parts) <= MOST_PARTS:
            for tag, part in result.parts.items():
                _add_scores(table, f"  {tag}", part, style="", verdicts={})
    return table


def _add_scores(
    table: Table, label: str, scores: EvaluationResult | Part, *, style: str, verdicts: Mapping[str, str]
) -> None:
    for i, (metric, value) in enumerate(scores.metrics.items()):
        interval = scores.intervals.get(metric)
        cells: list[str | Text] = [
            label if i == 0 else "",
            metric,
            Text(f"{100 * value:.2f}", style=style),
            f"{100 * interval[0]:.2f} – {100 * interval[1]:.2f}" if interval else "",
            f"{100 * scores.chance[metric]:.2f}" if metric in scores.chance else "",
            f"{scores.num_items:,}" if i == 0 else "",
        ]
        if verdicts:
            pitfall = verdicts[metric].startswith(PITFALL)
            cells.append(Text(verdicts[metric], style="red" if pitfall else ""))
        table.add_row(*cells)
