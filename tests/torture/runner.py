"""Run rows in pieces that add up: every finished case is written down, and a run given again goes on after it."""

import importlib
import json
import math
import pkgutil
import subprocess
import time
from collections.abc import Collection, Iterable
from datetime import date
from pathlib import Path

import tests.torture
from tests.torture.row import Outcome, Row

SECONDS_BETWEEN_RECORDS = 30.0
RESULTS_NAME = "results.jsonl"


def find_rows() -> list[Row]:
    """Return the rows of every module of this folder, in the order of the table."""
    rows: list[Row] = []
    for module in pkgutil.iter_modules(tests.torture.__path__):
        if not module.name.startswith(("__", "test_", "row", "runner")):
            rows += importlib.import_module(f"tests.torture.{module.name}").ROWS
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys)), f"two rows have one number: {sorted(keys)}"
    return sorted(rows, key=lambda row: (row.number, row.part))


def chosen(rows: Iterable[Row], names: Collection[str]) -> list[Row]:
    """Return the rows of these keys or numbers, all of them if there is none."""
    known = {name for row in rows for name in (row.key, str(row.number))}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}: there are {', '.join(row.key for row in rows)}")
    return [row for row in rows if not names or row.key in names or str(row.number) in names]


def run_row(row: Row, *, fraction: float, out: Path, seed: int) -> None:
    """Run what is left of `fraction` of the row's cases and append the results to `out`."""
    goal = math.ceil(fraction * row.nightly)
    done = sum(record["done"] for record in read_results(out) if (record["row"], record["seed"]) == (row.key, seed))
    if done >= goal:
        return
    print(f"row {row.key}: {row.text}: cases {done + 1:,} to {goal:,}", flush=True)
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    try:
        for outcome in row.run(done, goal - done, seed):
            outcomes.append(outcome)
            if outcome.error:
                print(f"row {row.key} failed: --rows {row.key} --case {outcome.seed}\n{outcome.error}", flush=True)
            if time.monotonic() - begun > SECONDS_BETWEEN_RECORDS:
                _append(out, row=row, seed=seed, outcomes=outcomes, seconds=time.monotonic() - begun)
                outcomes, begun = [], time.monotonic()
    finally:
        _append(out, row=row, seed=seed, outcomes=outcomes, seconds=time.monotonic() - begun)


def read_results(out: Path) -> list[dict]:
    """Return the records that were appended; a killed run may have left half a line."""
    path = out / RESULTS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def table(rows: Iterable[Row], *, out: Path) -> str:
    """Return the results of all pieces as a markdown table."""
    lines = ["| # | target | done | of | failed | minutes | date | commit |", "|--:|---|--:|--:|--:|--:|---|---|"]
    records = read_results(out)
    for row in rows:
        own = [record for record in records if record["row"] == row.key]
        if not own:
            lines.append(f"| {row.key} | {row.text} | 0 | {row.nightly:,} | | | | |")
            continue
        done, failed = (sum(record[name] for record in own) for name in ("done", "failed"))
        minutes = sum(record["seconds"] for record in own) / 60
        dates, commits = (list(dict.fromkeys(record[name] for record in own)) for name in ("date", "commit"))
        lines.append(
            f"| {row.key} | {row.text} | {done:,} | {row.nightly:,} | {failed:,} | {minutes:.1f} | "
            f"{_span(dates)} | {_span(commits)} |"
        )
    return "\n".join(lines)


def _append(out: Path, *, row: Row, seed: int, outcomes: list[Outcome], seconds: float) -> None:
    if not outcomes:
        return
    failures = [outcome._asdict() for outcome in outcomes if outcome.error]
    record = {
        "row": row.key,
        "done": len(outcomes),
        "passed": len(outcomes) - len(failures),
        "failed": len(failures),
        "failures": failures,
        "seed": seed,
        "seconds": round(seconds, 1),
        "date": date.today().isoformat(),
        "commit": _commit(),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULTS_NAME
    whole = path.read_text(encoding="utf-8").endswith("\n") if path.exists() else True
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(record) + "\n")


def _commit() -> str:
    root = Path(__file__).parents[2]
    described = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(described, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _span(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
