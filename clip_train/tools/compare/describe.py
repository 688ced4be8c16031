"""The words of a comparison, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from clip_train.errors import first_of
from clip_train.tools.compare.comparison import ClassChange, Comparison, Row

MOST_CLASSES = 5  # that gain and that lose most
MANY = 10  # scores, of which chance alone may well call one different
SEED_REMARK = "* below 0.2 points: training the same recipe with another seed changes about as much"


def remarks_of(found: Comparison) -> list[str]:
    """Return what a reader of the table must know besides."""
    lines = [f"{name}: not compared, {reason}" for name, reason in found.refused.items()]
    lines += [f"only in {side}: {', '.join(names)}" for side, names in found.only.items()]
    lines += found.remarks
    if not found.rows:
        lines.append("no evaluation that both have")
    tested = sum(row.interval is not None for row in found.rows)
    if tested >= MANY:
        lines.append(f"{tested} scores were tested: one in twenty is called better or worse by chance alone")
    if any(row.within_seed_spread for row in found.rows):
        lines.append(SEED_REMARK)
    if any(row.seeds for row in found.rows):
        seeds = next(row.seeds for row in found.rows if row.seeds)
        lines.append(
            f"over seeds: Welch's t-interval of the difference of means, {seeds.num_first} seeds against "
            f"{seeds.num_second}, df degrees of freedom; better and worse need it without zero, too"
        )
    return lines


def class_lines(changes: Sequence[ClassChange]) -> list[str]:
    """Return the classes that gained and lost most, as lines."""
    won = [change for change in changes if change.gain > 0]
    lost = [change for change in reversed(changes) if change.gain < 0]
    lines = [f"{len(won)} classes of {len(changes)} have more right answers, {len(lost)} fewer"]
    for sign, some in (("+", won), ("-", lost)):
        if some:
            shown = (f"{c.name} {c.first:g} -> {c.second:g} of {c.num_items}" for c in some)
            lines.append(f"{sign} {first_of(shown, most=MOST_CLASSES)}")
    return lines


def verdict_of(row: Row) -> str:
    """Return the verdict with a star where seeds may explain the difference."""
    return row.verdict + (" *" if row.within_seed_spread else "")


def seed_interval(row: Row) -> str:
    """Return the interval over seeds, in points, with its degrees of freedom."""
    if row.seeds is None:
        return ""
    if row.seeds.interval is None:
        return "seeds all equal"
    low, high = row.seeds.interval
    return f"{100 * low:+.2f} to {100 * high:+.2f} (df {row.seeds.degrees_of_freedom:.1f})"


def p_value(row: Row) -> str:
    """Return McNemar's p as people write it, with the items that one side alone answers rightly."""
    if row.split is None:
        return ""
    p = row.split.p_value
    shown = "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
    return f"{shown} ({row.split.only_second}:{row.split.only_first})"
