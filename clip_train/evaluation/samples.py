"""Pictures of an evaluation with the model's answers, small enough to put into a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import IntegrityError

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
    pair_pictures: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 3), dtype=np.uint8))
    """[M, S, S, 3] uint8; M is 0 for sets without captions."""
    pair_captions: list[str] = field(default_factory=list)
    """M of them; caption i belongs to picture i."""
    pair_cosines: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    """[M, M] float32, pictures down, captions across."""


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


def read_pictures(source: ImageSource, places: np.ndarray, *, size: int) -> np.ndarray:
    """Return the pictures at `places` as the model sees them, [P, size, size, 3] uint8."""
    from clip_train.data.images.decode import open_image
    from clip_train.data.images.transforms import preprocess_pixels

    return np.stack([preprocess_pixels(open_image(source.read(int(i))), image_size=size) for i in places])
