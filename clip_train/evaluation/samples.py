"""Pictures of an evaluation with the model's answers, small enough to put into a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import IntegrityError
from clip_train.evaluation.classify import Classify
from clip_train.evaluation.result import EvaluationResult, evenly_spaced
from clip_train.evaluation.retrieve import Retrieve

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource

NUM_PICTURES = 24
PICTURE_SIZE = 112


@dataclass(slots=True, kw_only=True)
class PictureAnswers:
    """What the model says about one picture."""

    truth: list[str]
    """The right class, or the picture's own captions."""
    answers: list[str]
    """Nearest classes or captions, best first."""
    cosines: list[float]
    right: bool
    """The first answer is true."""


@dataclass(slots=True, kw_only=True)
class ReportSamples:
    """Pictures that nobody has picked: evenly spaced over the set."""

    pictures: np.ndarray
    """[P, S, S, 3] uint8."""
    answers: list[PictureAnswers]
    """P of them."""
    pair_pictures: np.ndarray
    """[M, S, S, 3] uint8; M is 0 for sets without captions."""
    pair_captions: list[str] = field(default_factory=list)
    """M of them; caption i belongs to picture i."""
    pair_cosines: np.ndarray
    """[M, M] float32, pictures down, captions across."""


def collect(evaluator: Classify | Retrieve, result: EvaluationResult, *, size: int = PICTURE_SIZE) -> ReportSamples:
    """Read again the pictures that the report shows and join them with the answers in `result`. For one rank alone.

    Args:
        evaluator: what made the result.
        result: its newest result.
        size: side of the square pictures in pixels.
    """
    if isinstance(evaluator, Classify):
        return _collect_classes(evaluator, result, size=size)
    return _collect_captions(evaluator, result, size=size)


def save_samples(samples: ReportSamples, path: Path) -> None:
    """Write `path` (.json) and the pixels beside it (.npz)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path.with_suffix(".npz"),
        pictures=samples.pictures,
        pair_pictures=samples.pair_pictures,
        pair_cosines=samples.pair_cosines,
    )
    content = {"answers": [asdict(a) for a in samples.answers], "pair_captions": samples.pair_captions}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_samples(path: Path) -> ReportSamples:
    """Read what `save_samples` wrote.

    Raises:
        IntegrityError: a file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            return ReportSamples(
                pictures=arrays["pictures"],
                pair_pictures=arrays["pair_pictures"],
                pair_cosines=arrays["pair_cosines"],
                pair_captions=content["pair_captions"],
                answers=[PictureAnswers(**answer) for answer in content["answers"]],
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read as pictures of a report: {error}") from error


def _collect_classes(evaluator: Classify, result: EvaluationResult, *, size: int) -> ReportSamples:
    images = evaluator.images
    chosen = evenly_spaced(result.num_items, count=NUM_PICTURES)
    answers = [
        PictureAnswers(
            truth=[images.classnames[images.labels[i]]],
            answers=[images.classnames[c] for c in result.predictions["top"][i]],
            cosines=[round(float(c), 4) for c in result.predictions["cosine"][i]],
            right=bool(result.predictions["top"][i][0] == images.labels[i]),
        )
        for i in chosen
    ]
    return ReportSamples(
        pictures=_read_pictures(images.source, chosen, size=size),
        answers=answers,
        pair_pictures=np.zeros((0, size, size, 3), dtype=np.uint8),
        pair_cosines=np.zeros((0, 0), dtype=np.float32),
    )


def _collect_captions(evaluator: Retrieve, result: EvaluationResult, *, size: int) -> ReportSamples:
    images, found = evaluator.images, result.predictions
    answers = []
    for picture, top, cosines in zip(found["picture"], found["picture_top"], found["picture_cosine"], strict=True):
        first, last = np.searchsorted(images.owner, [picture, picture + 1])
        truth = list(images.captions[first:last])
        nearest = [images.captions[t] for t in top]
        # Another picture with the very same caption is no mistake that a reader could see.
        answers.append(
            PictureAnswers(
                truth=truth,
                answers=nearest,
                cosines=[round(float(c), 4) for c in cosines],
                right=nearest[0] in truth,
            )
        )
    return ReportSamples(
        pictures=_read_pictures(images.source, found["picture"], size=size),
        answers=answers,
        pair_pictures=_read_pictures(images.source, found["pair_image"], size=size),
        pair_captions=[images.captions[t] for t in found["pair_caption"]],
        pair_cosines=found["pair_cosine"],
    )


def _read_pictures(source: ImageSource, places: np.ndarray, *, size: int) -> np.ndarray:
    from clip_train.data.images.decode import open_image
    from clip_train.data.images.transforms import preprocess_pixels

    return np.stack([preprocess_pixels(open_image(source.read(int(i))), image_size=size) for i in places])
