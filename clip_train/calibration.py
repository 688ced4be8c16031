"""What was measured of a model's confidence: the temperature of its probabilities, and when it does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from clip_train.errors import IntegrityError
from clip_train.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION_FILE = "calibration.json"
FORMAT = 1
FEWEST_TO_FIT = 100  # pictures; what rests on fewer is remarked, and takes the place of nothing that rests on more


class RejectScore(StrEnum):
    """How sure it is that a picture shows one of the labels; `evaluation/reject/scores.py` computes them."""

    max_cosine = "max_cosine"
    mcm = "mcm"
    msp = "msp"
    margin = "margin"
    energy = "energy"
    negative_labels = "negative_labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How far probabilities can be believed, over n answers."""

    ece: float
    """Expected calibration error: mean distance between confidence and accuracy over the bins, by their counts."""
    nll: float
    """Mean negative log-probability of the right label, nats."""
    brier: float
    """Mean squared distance of the probabilities from the truth, summed over the labels (or yes and no), in [0, 2]."""
    accuracy: float
    """Share of right answers; where each label is judged by itself, of yes from a probability of ½ on."""
    counts: Sequence[int]
    """Answers in each bin of confidence, (0, 1/15] first."""
    confidences: Sequence[float | None]
    """Mean confidence in each bin; None if it is empty."""
    accuracies: Sequence[float | None]
    """Share of right answers in each bin; None if it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """The temperature of a model's probabilities, fitted on one half of a set and judged on the other."""

    value: float
    """Divides the logits; above 1 the model was too sure of itself."""
    bias: float | None = None
    """None: probabilities are a softmax over the labels. Else the model judges each label by itself (SigLIP):
    sigmoid(logits / value + bias) is how likely a label belongs to the picture where right and wrong ones are equally
    many, and `before` and `after` are over pictures with their label and with a wrong one."""
    data: str
    """The set."""
    num_fitted: int
    num_tested: int
    before: Reliability
    """Of the other half, at temperature 1."""
    after: Reliability
    """Of the other half, at this temperature."""
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Thresholds that 95 % of known pictures reach, fitted on one half of these and judged on the other."""

    thresholds: Mapping[RejectScore, float]
    known_passing: Mapping[RejectScore, float]
    """Share of the other half of the known pictures that reach each threshold."""
    foreign_passing: Mapping[str, Mapping[RejectScore, float]]
    """Share of the pictures of each foreign set that do."""
    auroc: Mapping[str, Mapping[RejectScore, float]]
    """Chance that a known picture scores above one of each foreign set."""
    coverages: Sequence[float]
    """Shares of the known pictures, those with the highest cosines first, up to all of them."""
    risks: Sequence[float]
    """Share of wrong labels among as many."""
    data: str
    """The known set."""
    num_fitted: int
    num_tested: int
    num_foreign: Mapping[str, int]
    templates: Sequence[str] | None
    """What the labels were put into, with `{}` for the label; None if each had prompts of its own."""
    prompts_sha256: str
    """Of all prompts, see `hash_prompts`: the scores but `max_cosine` hold for exactly these."""
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What is known of the confidence of exactly these weights."""

    weights_sha256: str
    model: str
    """The run and step, or the name that was evaluated."""
    temperature: Temperature | None
    rejection: Rejection | None


Measured = TypeVar("Measured", Temperature, Rejection)


def hash_prompts(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a set of prompts, whatever their order."""
    return sha256("\n".join(sorted(set(prompts))).encode()).hexdigest()


def latest(own: Calibration | None, other: Calibration | None) -> Calibration | None:
    """Return each part from whichever of two calibrations of the same weights measured it last, `own` if both did."""
    if own is None or other is None:
        return own or other
    return replace(
        own, temperature=_later(own.temperature, other.temperature), rejection=_later(own.rejection, other.rejection)
    )


def _later(own: Measured | None, other: Measured | None) -> Measured | None:
    return other if own is None or (other is not None and other.date > own.date) else own


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write `path` (.json), at once."""
    replace_file(path, json.dumps(calibration_to_json(calibration), indent=1) + "\n")


def read_calibration(path: Path) -> Calibration | None:
    """Read what `write_calibration` wrote; None if there is no such file.

    Raises:
        IntegrityError: the file is no calibration, or one of a newer version.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    return calibration_from_json(content, origin=str(path))


def calibration_to_json(calibration: Calibration) -> dict[str, Any]:
    """Return the calibration as JSON values."""
    return {"format": FORMAT, **asdict(calibration)}


def calibration_from_json(content: object, *, origin: str) -> Calibration:
    """Return the calibration that JSON values describe.

    Raises:
        IntegrityError: they describe none, or one of a newer version; the message starts with `origin`.
    """
    try:
        values = dict(content)  # type: ignore[call-overload]
        version = values.pop("format")
        if version != FORMAT:
            raise IntegrityError(f"{origin}: a calibration of format {version}, this version reads {FORMAT}")
        temperature, rejection = values.pop("temperature"), values.pop("rejection")
        return Calibration(
            temperature=None if temperature is None else temperature_from_json(temperature),
            rejection=None if rejection is None else rejection_from_json(rejection),
            **values,
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{origin}: not a calibration ({type(error).__name__}: {error})") from error


def temperature_from_json(content: Mapping[str, Any]) -> Temperature:
    """Return what `asdict` made of a temperature."""
    both = {key: _reliability(content[key]) for key in ("before", "after")}
    return Temperature(**{**content, **both, "value": float(content["value"])})


def rejection_from_json(content: Mapping[str, Any]) -> Rejection:
    """Return what `asdict` made of a rejection."""
    by_score = {key: _by_score(content[key]) for key in ("thresholds", "known_passing")}
    by_set = {
        key: {name: _by_score(values) for name, values in content[key].items()} for key in ("foreign_passing", "auroc")
    }
    return Rejection(**{**content, **by_score, **by_set})


def _reliability(content: Mapping[str, Any]) -> Reliability:
    means = {
        key: [None if value is None else float(value) for value in content[key]]
        for key in ("confidences", "accuracies")
    }
    numbers = {key: float(content[key]) for key in ("ece", "nll", "brier", "accuracy")}
    return Reliability(**{**content, **means, **numbers, "counts": [int(count) for count in content["counts"]]})


def _by_score(values: Mapping[str, float]) -> dict[RejectScore, float]:
    return {RejectScore(name): float(value) for name, value in values.items()}
