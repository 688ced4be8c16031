"""Look at a run that has ended, or is under way: how it ended, and the loss doctor's signatures in its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.config import from_yaml
from clip_train.exit_record import read_exit
from clip_train.health.doctor import Facts, diagnose
from clip_train.tools.run import Run
from clip_train.tools.verdict import Line, Verdict

if TYPE_CHECKING:
    from pathlib import Path

_STILL_USABLE = (2, 3, 4, 6, 8, 10)  # signatures with which a run learns all the same, if less than it could


def examine_run(run_dir: Path) -> list[Line]:
    """Return a line on the end of a run and one for every signature of a sick run in its rows.

    Raises:
        UserError: it is not the directory of a run.
    """
    run = Run(run_dir)
    config = from_yaml(run.path / "config.yaml")
    rows = [row for row in run.metrics if "train/loss" in row]
    lines = [_end(run.path)]
    if not rows:
        return [*lines, Line(Verdict.warning, "rows", "there are none yet")]
    last = int(rows[-1]["step"])
    lost = [int(row["step"]) for row in rows if row["train/loss"] is None]
    if lost:
        text = f"not finite in {len(lost):,} of {len(rows):,} rows, first at step {lost[0]:,}"
        verdict = Verdict.fail if lost[-1] == last else Verdict.warning
        lines.append(Line(verdict, "loss", text, "see that batch: `clip-train shards replay`; or lower optim.lr"))
    findings = diagnose(rows, facts=Facts.of(config, steps=config.steps or last))
    for one in findings:
        verdict = Verdict.warning if one.number in _STILL_USABLE else Verdict.fail
        lines.append(Line(verdict, one.name.replace("_", " "), f"at step {one.step:,}: {one.message}"))
    if not findings and not lost:
        text = f"none of the ten signatures of a sick run in {len(rows):,} rows up to step {last:,}"
        lines.append(Line(Verdict.ok, "loss", text))
    return lines


def _end(run_dir: Path) -> Line:
    record = read_exit(run_dir)
    if record is None:
        return Line(Verdict.warning, "end", "none: it is under way, or was killed", "the same command continues it")
    at = "" if record.step is None else f" at step {record.step:,}"
    if record.code in (0, 85):
        return Line(Verdict.ok, "end", f"{record.reason}{at}")
    return Line(Verdict.fail, "end", f"exit code {record.code}{at}: {record.reason}")
