"""The report's section on confidence: how far probabilities can be believed, and when the model does not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from clip_train.calibration import CALIBRATION_FILE, Calibration, RejectScore, read_calibration
from clip_train.tools.charts import Chart, line_chart
from clip_train.tools.reliability import reliability_diagram

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """What the page shows of a run's calibration."""

    calibration: Calibration
    diagram: Markup | None
    """The reliability diagram, if there is a temperature."""
    risks: Chart | None
    """Wrong labels over coverage, if there is a threshold."""
    scores: list[tuple[RejectScore, float]]
    """The thresholds that `clip-train classify` uses, most general first."""


def read_confidence(run_dir: Path) -> Confidence | None:
    """Return what the run's calibration has to show, None if there is no calibration.

    Raises:
        IntegrityError: the file is damaged.
    """
    calibration = read_calibration(run_dir / CALIBRATION_FILE)
    if calibration is None:
        return None
    temperature, rejection = calibration.temperature, calibration.rejection
    risks = None
    if rejection is not None:
        risks = line_chart(
            [(100 * coverage, risk) for coverage, risk in zip(rejection.coverages, rejection.risks, strict=True)],
            title="Wrong labels among the surest (% of the known pictures)",
            unit="%",
            from_zero=True,
        )
    return Confidence(
        calibration=calibration,
        # Our own drawing, of numbers only: nothing in it can be markup of somebody else.
        diagram=None if temperature is None else Markup(reliability_diagram(temperature, standalone=False)),
        risks=risks,
        scores=[
            (score, rejection.thresholds[score])
            for score in (RejectScore.max_cosine, RejectScore.mcm)
            if rejection is not None
        ],
    )
