"""Say which label fits a picture, or that none does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_train.calibration import RejectScore, hash_prompts
from clip_train.errors import UserError
from clip_train.evaluation.features import TEXT_BATCH_SIZE, similarity
from clip_train.evaluation.prompts.files import fill, load_templates
from clip_train.evaluation.reject.scores import reject_scores
from clip_train.interop.pictures import picture_batches

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.calibration import Temperature
    from clip_train.interop.loaded_model import LoadedModel

BACKGROUND = ("a photo", "a photo of something else")
BATCH_SIZE = 32
AUTO, OFF, NONE = "auto", "off", "none"


class LabelScore(NamedTuple):
    """How well one label fits."""

    label: str
    probability: float
    cosine: float


class Threshold(NamedTuple):
    """Below which score a picture shows none of the labels, and where that is known from."""

    score: RejectScore
    value: float
    origin: str

    def __str__(self) -> str:
        return f"{self.score.value.replace('_', ' ')} {self.value:.3g}"


class Unknown(NamedTuple):
    """Why none of the labels counts as the answer."""

    value: float
    """Of the threshold's score."""
    threshold: Threshold
    nearest: str

    @property
    def reason(self) -> str:
        """What to tell a person."""
        return f"{self.value:.3g} is below {self.threshold}: {self.threshold.origin}"


class PictureScores(NamedTuple):
    """The labels of one picture, best first, or why it could not be read."""

    picture: str
    scores: list[LabelScore]
    unknown: Unknown | None
    error: str | None

    @property
    def answer(self) -> str | None:
        """The best label; None if the model does not know, or the picture could not be read."""
        return None if self.unknown or self.error is not None else self.scores[0].label


def classify(
    images: Iterable[Image.Image | str | Path],
    *,
    model: LoadedModel,
    labels: Sequence[str],
    templates: str = NONE,
    min_similarity: float | str = AUTO,
    top: int = 5,
) -> Iterator[PictureScores]:
    """Yield the best labels of each picture with probability and raw cosine, or that none of them fits.

    The probability is a softmax over the labels given, at the model's calibrated temperature if that was measured: it
    says which label fits best, not whether one fits; with a single label, background prompts stand against it. Models
    with a bias (SigLIP) judge each label by itself: once calibrated, the probability is that the label belongs to the
    picture, if right and wrong ones are equally many, whatever other labels are given. A picture that cannot be read
    yields why.

    Args:
        images: files or PIL images. EXIF orientation is applied.
        model: from `clip_train.load`.
        labels: texts; repeated ones count once.
        templates: `none` takes the labels as whole captions; `single`, `simple`, `imagenet`, a file of templates or a
            template with `{}` put them into prompts and average these.
        min_similarity: the cosine that the best label must reach, or the answer is unknown; `auto`: the threshold that
            was measured with the model, or a probability of one half of a calibrated SigLIP model, if there is one;
            `off`: there is always an answer.
        top: labels per picture.

    Raises:
        UserError: there is no label, or an argument is out of range or no list.
    """
    if isinstance(model, str | os.PathLike):
        raise UserError(f"model={str(model)!r} is a path: give the model that clip_train.load returns")
    if isinstance(labels, str) or isinstance(images, str | os.PathLike | Image.Image):
        raise UserError("classify takes several images and labels: put a single one into a list")
    names = list(dict.fromkeys(labels))
    if any(not isinstance(name, str) for name in names):
        raise UserError(f"labels must be texts, not {next(n for n in names if not isinstance(n, str))!r}")
    if not names:
        raise UserError("labels is empty: give at least one text")
    if top < 1:
        raise UserError(f"top={top} must be at least 1")
    if not isinstance(templates, str | os.PathLike):
        raise UserError(f"templates={templates!r} must be one text: several templates go into a file, one a line")
    patterns = ["{}"] if templates == NONE else load_templates(os.fspath(templates))
    threshold = choose_threshold(model, labels=names, templates=patterns, min_similarity=min_similarity)
    texts = [[fill(pattern, classname=name) for pattern in patterns] for name in names]
    return _classify(images, model=model, names=names, texts=texts, threshold=threshold, top=top)


def choose_threshold(
    model: LoadedModel, *, labels: Sequence[str], templates: Sequence[str], min_similarity: float | str
) -> Threshold | None:
    """Return the threshold that holds for these labels in these templates, None for none.

    `auto` is the maximum concept matching where the prompts are exactly those that it was measured with, and else the
    highest cosine, which hardly depends on what other labels there are. Where no threshold was measured, but a model
    with a bias was calibrated, it is the cosine at which a label is as likely right as wrong.

    Raises:
        UserError: `min_similarity` is neither `auto`, `off` nor a cosine.
    """
    if min_similarity == OFF:
        return None
    if min_similarity != AUTO:
        if not isinstance(min_similarity, Real) or not -1 <= min_similarity <= 1:
            raise UserError(f"min_similarity={min_similarity} must be {AUTO}, {OFF} or a cosine in [-1, 1]")
        return Threshold(RejectScore.max_cosine, float(min_similarity), "as asked for")
    if model.calibration is None:
        return None
    if model.calibration.rejection is None:
        return _even_chance(model, model.calibration.temperature)
    rejection = model.calibration.rejection
    prompts = [fill(template, classname=label) for label in labels for template in templates]
    is_same = len(labels) > 1 and hash_prompts(prompts) == rejection.prompts_sha256
    score = RejectScore.mcm if is_same else RejectScore.max_cosine
    origin = f"95 % of the pictures of {rejection.data} reach it"
    if rejection.templates and list(rejection.templates) != [fill(t, classname="{}") for t in templates]:
        # Other prompts have other cosines: who reads the answer must know.
        origin += f", with labels in '{rejection.templates[0]}'"
        origin += f" and {len(rejection.templates) - 1} more templates" if len(rejection.templates) > 1 else ""
    return Threshold(score, rejection.thresholds[score], origin)


def _even_chance(model: LoadedModel, temperature: Temperature | None) -> Threshold | None:
    """Return the cosine at which a calibrated sigmoid is one half; None for a softmax, which has none."""
    if temperature is None or temperature.bias is None or model.logit_bias is None:
        return None
    cosine = -(temperature.bias * temperature.value + float(model.logit_bias)) / float(model.logit_scale.exp())
    origin = f"of the pictures of {temperature.data}, right and wrong labels are equally likely there"
    return Threshold(RejectScore.max_cosine, cosine, origin)


@torch.no_grad()
def _classify(
    images: Iterable[Image.Image | str | Path],
    *,
    model: LoadedModel,
    names: list[str],
    texts: list[list[str]],
    threshold: Threshold | None,
    top: int,
) -> Iterator[PictureScores]:
    num_labels = len(names)
    if num_labels == 1 and model.logit_bias is None:
        names = names + [f"({prompt})" for prompt in BACKGROUND]
        texts = texts + [[prompt] for prompt in BACKGROUND]
    device = model.logit_scale.device
    vectors = _label_vectors(texts, model=model)
    with closing(picture_batches(images, preprocess=model.preprocess, batch_size=BATCH_SIZE, upright=True)) as batches:
        for batch in batches:
            pixels = [loaded for _, loaded in batch if isinstance(loaded, Tensor)]
            features = model.encode_image(torch.stack(pixels).to(device)) if pixels else vectors[:0]
            cosines = similarity(features, vectors).cpu()
            rows = iter(zip(cosines, _probabilities(cosines, model=model), strict=True))
            for picture, loaded in batch:
                if isinstance(loaded, str):
                    yield PictureScores(picture, [], None, loaded)
                    continue
                cosine, probability = next(rows)
                order = cosine.argsort(descending=True, stable=True)[:top].tolist()
                scores = [LabelScore(names[c], float(probability[c]), float(cosine[c])) for c in order]
                unknown = _reject(cosine[:num_labels], names=names, threshold=threshold)
                yield PictureScores(picture, scores, unknown, None)


def _label_vectors(texts: list[list[str]], *, model: LoadedModel) -> Tensor:
    """Return the mean unit feature of each label's prompts, [C, D] of unit length."""
    device = model.logit_scale.device
    labels_at_once = max(1, TEXT_BATCH_SIZE // len(texts[0]))
    means = []
    for start in range(0, len(texts), labels_at_once):
        group = texts[start : start + labels_at_once]
        features = model.encode_text(model.tokenize([prompt for own in group for prompt in own]).to(device))
        means += [own.float().mean(dim=0) for own in features.split([len(own) for own in group])]
    return F.normalize(torch.stack(means), dim=-1)


def _probabilities(cosines: Tensor, *, model: LoadedModel) -> Tensor:
    """Return [n, C] from cosines [n, C]."""
    logits = model.logit_scale.float().exp().cpu() * cosines
    measured = model.calibration and model.calibration.temperature
    if model.logit_bias is not None:
        logits = logits + model.logit_bias.float().cpu()
        if measured and measured.bias is not None:
            logits = logits / measured.value + measured.bias
        return torch.sigmoid(logits)
    return (logits / measured.value if measured else logits).softmax(dim=1)


def _reject(cosines: Tensor, *, names: Sequence[str], threshold: Threshold | None) -> Unknown | None:
    """Judge one picture by its cosines [C] with the labels."""
    if threshold is None:
        return None
    if threshold.score is RejectScore.max_cosine:
        value = float(cosines.max())
    else:
        value = float(reject_scores(cosines[None], logit_scale=1.0)[threshold.score][0])
    return None if value >= threshold.value else Unknown(value, threshold, names[int(cosines.argmax())])
