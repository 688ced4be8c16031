"""A suite: many evaluations at once, of which those are run whose data are there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from clip_train.evaluation.config import EvaluationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What a suite came to."""

    suite: str
    size: int
    """Sets of the suite, run or not."""
    means: dict[str, float]
    """Metric -> mean over the sets that report it."""
    sets: dict[str, list[str]]
    """Metric -> those sets. A collapsed model reports nothing."""
    missing: dict[str, str]
    """Set -> where it was looked for."""

    def lines(self) -> list[str]:
        """Return the result for a person: every mean says how many sets it is over."""
        means = [
            f"{self.suite}: mean {metric} {100 * mean:.2f} % over {len(self.sets[metric])} of {self.size} sets"
            for metric, mean in self.means.items()
        ]
        return [*means, *(f"{self.suite}: {name} is not there ({place})" for name, place in self.missing.items())]

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


def summarize(scores: Mapping[str, float], *, suite: str, names: Sequence[str], missing: dict[str, str]) -> SuiteResult:
    """Average each metric over the sets that report it.

    Args:
        scores: `NAME/metric` -> value.
        suite: its name.
        names: all sets of the suite.
        missing: those that were not run, with the reason.
    """
    sets: dict[str, list[str]] = {}
    for key in scores:
        name, _, metric = key.partition("/")
        sets.setdefault(metric, []).append(name)
    means = {metric: sum(scores[f"{name}/{metric}"] for name in over) / len(over) for metric, over in sets.items()}
    return SuiteResult(suite=suite, size=len(names), means=means, sets=sets, missing=missing)
