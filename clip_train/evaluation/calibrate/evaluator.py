"""The temperature of a model's probabilities (and a bias), and their reliability, on all ranks."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from clip_train.calibration import FEWEST_TO_FIT, Temperature
from clip_train.errors import UserError
from clip_train.evaluation.calibrate.pairs import (
    ScaleAndBias,
    answer_pairs,
    draw_pairs,
    fit_scale_and_bias,
    measure_pairs,
)
from clip_train.evaluation.calibrate.temperature import (
    MAX_TEMPERATURE,
    Answers,
    Questions,
    answer,
    fit_temperature,
    measure_reliability,
)
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import DualEncoder, encode_all_images, encode_texts, tokenize_texts
from clip_train.evaluation.prompts.classifier import build_classifier, tokenize_prompts
from clip_train.evaluation.result import EvaluationResult, item_keys, two_halves

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.evaluation.retrieve.captioned_images import CaptionedImages

METRICS = ("ece_before", "ece_after")


class Fitted(NamedTuple):
    """What was fitted on one half of a set, and the answers of the other half without and with it."""

    temperature: float
    bias: float | None  # of a sigmoid; None for a softmax
    before: Answers
    after: Answers


class Calibrate(Evaluator):
    """The temperature with the highest likelihood on one half of a set, and how reliable it makes the other half.

    A model with a bias (SigLIP) judges each label by itself: its sigmoid gets a temperature and a bias.

    One temperature serves a model on other sets and prompts too (LeVine et al. 2023, arXiv 2303.12748).

    Args:
        images: labelled, with their class names as labels; or captioned, with the captions of the same half as labels.
        setting: what it works with.
        data: what to call the set.

    Raises:
        UserError: there are fewer than four images or two labels, or images with several classes.
    """

    def __init__(self, images: LabelledImages | CaptionedImages, *, setting: Setting, data: str) -> None:
        super().__init__(setting)
        if isinstance(images, LabelledImages) and images.multilabel:
            raise UserError(f"calibrate needs pictures of one class each; those of {data} have any number")
        if len(images.source) < 4:
            raise UserError(f"calibrate needs at least four pictures, {data} has {len(images.source)}")
        self.images = images
        self._data = data

    def metric_names(self) -> list[str]:
        """Return the two errors."""
        return list(METRICS)

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return the calibration error before and after; the temperature and everything else is among the details."""
        source = self.images.source
        features = encode_all_images(model, self.setting.read(source), num_images=len(source), world=self.world)
        labels, right = self._labels(model)
        asked = Questions(features, labels, right, float(model.logit_scale.exp()))
        fitted, tested = two_halves(len(source))
        to_fit, to_test = asked.take(fitted), asked.take(tested)
        if not isinstance(self.images, LabelledImages):
            to_fit, to_test = _among_own(to_fit), _among_own(to_test)
        if min(len(to_fit.labels), len(to_test.labels)) < 2:
            raise UserError(f"calibrate needs at least two labels, {self._data} has one")
        if model.logit_bias is None:
            found = _fit_softmax(to_fit, to_test)
        else:
            found = _fit_sigmoid(to_fit, to_test, logit_bias=float(model.logit_bias))
        measure = measure_reliability if found.bias is None else measure_pairs
        temperature = Temperature(
            value=found.temperature,
            bias=found.bias,
            data=self._data,
            num_fitted=len(fitted),
            num_tested=len(tested),
            before=measure(found.before),
            after=measure(found.after),
            date=time.strftime("%Y-%m-%d"),
        )
        result = _report(temperature, before=found.before, after=found.after)
        result.predictions["place"] = np.resize(tested, len(found.after.correct))
        result.predictions["key"] = item_keys(source)[result.predictions["place"]]
        result.details["labels"] = len(to_test.labels)
        result.collapsed = collapsed_tower(image=features, text=labels)
        return result

    def _labels(self, model: DualEncoder) -> tuple[Tensor, Tensor]:
        """Return the features [U, D] of the distinct labels, and the place [N] of each image's right one."""
        tokenizer, images = self.setting.tokenizer, self.images
        if isinstance(images, LabelledImages):
            prompts = tokenize_prompts(tokenizer, classnames=images.classnames, templates=images.templates)
            classifier = build_classifier(model, prompts, world=self.world)
            return classifier.vectors, classifier.rows[torch.from_numpy(images.labels).to(classifier.rows.device)]
        first = np.unique(images.owner, return_index=True)[1]  # [N]
        captions = tokenize_texts(tokenizer, [images.captions[i] for i in first])
        texts = encode_texts(model, captions, world=self.world)
        return texts.features, texts.rows


def _among_own(questions: Questions) -> Questions:
    """Return the questions with those labels only that are the right answer of one of them."""
    own, right = questions.right.unique(return_inverse=True)
    return questions._replace(labels=questions.labels[own], right=right)


def _fit_softmax(to_fit: Questions, to_test: Questions) -> Fitted:
    value = fit_temperature(to_fit)
    return Fitted(value, None, answer(to_test, temperature=1.0), answer(to_test, temperature=value))


def _fit_sigmoid(to_fit: Questions, to_test: Questions, *, logit_bias: float) -> Fitted:
    found = fit_scale_and_bias(draw_pairs(to_fit, logit_bias=logit_bias))
    pairs = draw_pairs(to_test, logit_bias=logit_bias)
    before, after = (answer_pairs(pairs, one) for one in (ScaleAndBias(1.0, 0.0), found))
    return Fitted(found.temperature, found.bias, before, after)


def _report(temperature: Temperature, *, before: Answers, after: Answers) -> EvaluationResult:
    raw, calibrated = temperature.before, temperature.after
    fitted = f"temperature {temperature.value:.3f}"
    judged, accuracy = f"{temperature.num_tested}", f"at {100 * raw.accuracy:.1f} % accuracy"
    if temperature.bias is not None:
        fitted += f" and bias {temperature.bias:+.3f} of each label by itself"
        judged += ", each with its label and a wrong one"
        accuracy = f"and accuracy {100 * raw.accuracy:.1f} % {100 * calibrated.accuracy:.1f} %"
    result = EvaluationResult(
        task="calibration",
        num_items=temperature.num_tested,
        metrics=dict(zip(METRICS, (raw.ece, calibrated.ece), strict=True)),
        chance={},
        intervals={},
        details={"temperature": asdict(temperature)},
        predictions={
            "correct": before.correct,
            "confidence_before": before.confidence,
            "confidence_after": after.confidence,
        },
        notes=[
            f"{fitted}, fitted on {temperature.num_fitted} pictures: on the other {judged}, "
            f"mean confidence {100 * before.confidence.mean():.1f} % becomes "
            f"{100 * after.confidence.mean():.1f} % {accuracy}, ECE {100 * raw.ece:.2f} % "
            f"becomes {100 * calibrated.ece:.2f} %, NLL {raw.nll:.4f} becomes {calibrated.nll:.4f}, Brier score "
            f"{raw.brier:.4f} becomes {calibrated.brier:.4f}"
        ],
    )
    if temperature.num_fitted < FEWEST_TO_FIT:
        result.warnings.append(f"the temperature rests on {temperature.num_fitted} pictures only")
    if not 1.01 / MAX_TEMPERATURE < temperature.value < MAX_TEMPERATURE / 1.01:
        result.warnings.append("the temperature is at its bound: these answers do not determine it")
    return result
