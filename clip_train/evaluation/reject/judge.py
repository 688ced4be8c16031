"""Turn the scores of known and foreign pictures into metrics and thresholds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from clip_train.calibration import FEWEST_TO_FIT, Rejection, RejectScore, hash_prompts
from clip_train.evaluation.prompts.files import Templates, fill, prompts_of
from clip_train.evaluation.reject import metrics
from clip_train.evaluation.result import EvaluationResult, Part, evenly_spaced, two_halves

MAIN_SCORE = RejectScore.max_cosine
"""Whose metrics stand in the table: it holds for any list of labels."""
KNOWN = "known"
"""What the arrays of the known pictures are named by; those of a foreign set have its name."""
NUM_CURVE_POINTS = 100


class Scored(NamedTuple):
    """What was found for each picture of a set."""

    scores: Mapping[RejectScore, np.ndarray]  # [N] float64 each
    top: np.ndarray  # [N, K] int64, nearest classes, best first
    cosine: np.ndarray  # [N, K] float32, with these


class KnownSet(NamedTuple):
    """The known pictures' classes, and how these are put into words."""

    name: str
    labels: np.ndarray  # [N] int64 in [0, C)
    classnames: Sequence[str]  # C
    templates: Templates


def judge(known: Scored, foreign: Mapping[str, Scored], *, of: KnownSet) -> EvaluationResult:
    """Score the separation by every score, fit the thresholds on one half of the known pictures, judge on the other.

    The metrics are those of the main score over all foreign pictures; the parts are the foreign sets.

    Args:
        known: pictures of the classes.
        foreign: pictures of something else, by set.
        of: the classes.
    """
    wrong = known.top[:, 0] != of.labels
    rejection = fit_thresholds(known, foreign, wrong=wrong, of=of)
    everything = {score: np.concatenate([one.scores[score] for one in foreign.values()]) for score in known.scores}
    details = {
        score.value: {
            "all": _measure(known.scores[score], everything[score]),
            **{name: _measure(known.scores[score], one.scores[score]) for name, one in foreign.items()},
            "aurc": metrics.aurc(known.scores[score], wrong),
        }
        for score in known.scores
    }
    main = _part(known.scores[MAIN_SCORE], everything[MAIN_SCORE])
    result = EvaluationResult(
        task="out_of_distribution_detection",
        num_items=main.num_items,
        metrics=main.metrics,
        chance=main.chance,
        intervals=main.intervals,
        parts={name: _part(known.scores[MAIN_SCORE], one.scores[MAIN_SCORE]) for name, one in foreign.items()},
        details={
            "known": len(wrong),
            "classes": len(of.classnames),
            "templates": len(of.templates),
            "main_score": MAIN_SCORE.value,
            "scores": details,
            "rejection": asdict(rejection),
        },
        predictions=_predictions(known, foreign) | {"label": of.labels},
        notes=[*_score_lines(details, sets=list(foreign)), *_threshold_lines(rejection)],
    )
    if rejection.num_fitted < FEWEST_TO_FIT:
        result.warnings.append(f"the thresholds rest on {rejection.num_fitted} pictures only")
    return result


def fit_thresholds(known: Scored, foreign: Mapping[str, Scored], *, wrong: np.ndarray, of: KnownSet) -> Rejection:
    """Return the threshold of every score that 95 % of one half of the known pictures reach, and who else does."""
    fitted, tested = two_halves(len(of.labels))
    thresholds = {score: metrics.threshold_at_95_tpr(values[fitted]) for score, values in known.scores.items()}

    def passing(scores: Mapping[RejectScore, np.ndarray], places: np.ndarray | slice) -> dict[RejectScore, float]:
        return {score: float((scores[score][places] >= value).mean()) for score, value in thresholds.items()}

    risk = metrics.risk_coverage(known.scores[MAIN_SCORE], wrong)
    places = evenly_spaced(len(risk), count=NUM_CURVE_POINTS)
    return Rejection(
        thresholds=thresholds,
        known_passing=passing(known.scores, tested),
        foreign_passing={name: passing(one.scores, slice(None)) for name, one in foreign.items()},
        auroc={
            name: {score: metrics.auroc(values, one.scores[score]) for score, values in known.scores.items()}
            for name, one in foreign.items()
        },
        coverages=((places + 1) / len(risk)).tolist(),
        risks=risk[places].tolist(),
        data=of.name,
        num_fitted=len(fitted),
        num_tested=len(tested),
        num_foreign={name: len(one.top) for name, one in foreign.items()},
        templates=None if isinstance(of.templates, Mapping) else [fill(t, classname="{}") for t in of.templates],
        prompts_sha256=hash_prompts([p for name in of.classnames for p in prompts_of(name, templates=of.templates)]),
        date=time.strftime("%Y-%m-%d"),
    )


def _measure(known: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
    return {
        "auroc": metrics.auroc(known, foreign),
        "aupr": metrics.aupr(known, foreign),
        "fpr_at_95_tpr": metrics.fpr_at_95_tpr(known, foreign),
    }


def _part(known: np.ndarray, foreign: np.ndarray) -> Part:
    return Part(
        num_items=len(known) + len(foreign),
        metrics=_measure(known, foreign),
        chance={"auroc": 0.5, "aupr": len(known) / (len(known) + len(foreign)), "fpr_at_95_tpr": 0.95},
        intervals=metrics.intervals(known, foreign),
    )


def _predictions(known: Scored, foreign: Mapping[str, Scored]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, one in {KNOWN: known, **foreign}.items():
        arrays |= {f"{name}_top": one.top, f"{name}_cosine": one.cosine}
        arrays |= {f"{name}_{score}": values for score, values in one.scores.items()}
    return arrays


def _score_lines(details: Mapping[str, Any], *, sets: Sequence[str]) -> list[str]:
    columns = ["all", *sets] if len(sets) > 1 else sets
    lines = ["AUROC / FPR at 95 % TPR, %".ljust(28) + "".join(name.rjust(16) for name in columns) + "AURC".rjust(8)]
    for score, by_set in details.items():
        cells = [f"{100 * by_set[c]['auroc']:.1f} / {100 * by_set[c]['fpr_at_95_tpr']:.1f}" for c in columns]
        lines.append(f"  {score}".ljust(28) + "".join(cell.rjust(16) for cell in cells) + f"{by_set['aurc']:8.4f}")
    return lines


def _threshold_lines(rejection: Rejection) -> list[str]:
    lines = []
    for score in (RejectScore.max_cosine, RejectScore.mcm):
        foreign = ", ".join(f"{100 * p[score]:.1f} % of {name}" for name, p in rejection.foreign_passing.items())
        lines.append(
            f"threshold {score} {rejection.thresholds[score]:.4f}: 95 % of {rejection.num_fitted} known pictures reach "
            f"it, and {100 * rejection.known_passing[score]:.1f} % of the other {rejection.num_tested}, {foreign}"
        )
    return lines
