"""Say which label fits a picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from clip_train.data.images.decode import BadSampleError, open_image
from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.features import similarity
from clip_train.evaluation.prompts.files import fill, load_templates

if TYPE_CHECKING:
    from collections.abc import Callable

    from clip_train.interop.loaded_model import LoadedModel

BACKGROUND = ("a photo", "a photo of something else")
BATCH_SIZE = 32


class LabelScore(NamedTuple):
    """How well one label fits."""

    label: str
    probability: float
    cosine: float


class PictureScores(NamedTuple):
    """The labels of one picture, best first, or why it could not be read."""

    path: Path
    scores: list[LabelScore]
    error: str | None


@torch.no_grad()
def classify(
    images: Iterable[Path],
    *,
    model: LoadedModel,
    preprocess: Callable[[Image.Image], Tensor],
    labels: Sequence[str],
    templates: str = "none",
    top: int = 5,
) -> Iterator[PictureScores]:
    """Yield the best labels of each picture with probability and raw cosine; a picture that cannot be read yields why.

    The probability is a softmax over the labels given, so it says which of them fits best, not whether one fits: with
    a single label, background prompts stand against it. Models with a bias (SigLIP) judge each label by itself.

    Args:
        images: files. EXIF orientation is applied.
        model: from `clip_train.load`.
        preprocess: from `clip_train.load`.
        labels: distinct texts.
        templates: `none` takes the labels as whole captions; `single`, `simple`, `imagenet` or a file of templates put
            them into prompts and average these.
        top: labels per picture.
    """
    texts = [[label] if templates == "none" else [fill(t, classname=label) for t in load_templates(templates)]
             for label in labels]  # fmt: skip
    names = list(labels)
    if len(labels) == 1:
        names += [f"({prompt})" for prompt in BACKGROUND]
        texts += [[prompt] for prompt in BACKGROUND]
    device = model.logit_scale.device
    vectors = torch.stack(
        [model.encode_text(model.tokenize(prompts).to(device)).float().mean(dim=0) for prompts in texts]
    )
    vectors = F.normalize(vectors, dim=-1)  # [C, D]
    for batch in _batches(images, preprocess=preprocess):
        pixels = [loaded for _, loaded in batch if isinstance(loaded, Tensor)]
        features = model.encode_image(torch.stack(pixels).to(device)) if pixels else vectors[:0]
        rows = iter(zip(*_score(features, vectors, model=model), strict=True))
        for path, loaded in batch:
            if isinstance(loaded, str):
                yield PictureScores(path, [], loaded)
                continue
            cosines, probabilities = next(rows)
            order = cosines.argsort(descending=True, stable=True)[:top].tolist()
            scores = [LabelScore(names[c], float(probabilities[c]), float(cosines[c])) for c in order]
            yield PictureScores(path, scores, None)


def classify_command(
    images: list[Path], *, labels: str, model: str, top: int, as_json: bool, templates: str = "none"
) -> int:
    """Classify files and folders and print the result; return the exit code, 3 if a picture could not be read.

    Args:
        images: pictures, or folders of pictures.
        labels: separated by commas.
        model: anything that `clip_train.load` takes.
        top: labels shown for each picture.
        as_json: print one JSON object per picture instead of a table.
        templates: see `classify`.

    Raises:
        UserError: there is no label or no picture, or `top` is not positive.
    """
    names = list(dict.fromkeys(label.strip() for label in labels.split(",") if label.strip()))
    if not names:
        raise UserError("--labels is empty: give texts separated by commas")
    if top < 1:
        raise UserError(f"--top={top} must be at least 1")
    paths = list(find_pictures(images))
    if not paths:
        raise UserError(f"no pictures in {', '.join(str(path) for path in images)}")
    if len(names) == 1:
        print(
            "one label: its probability would always be 1, so it is compared with "
            + " and ".join(f"'{prompt}'" for prompt in BACKGROUND),
            file=sys.stderr,
        )
    import clip_train

    loaded, preprocess = clip_train.load(model)
    results = classify(paths, model=loaded, preprocess=preprocess, labels=names, templates=templates, top=top)
    num_bad = print_json(results) if as_json else print_table(results)
    return IntegrityError.exit_code if num_bad else 0


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files as they are and the pictures below folders in order of their paths."""
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS)
            yield from sorted(found, key=os.fsencode)
        else:
            yield path


def print_json(results: Iterable[PictureScores]) -> int:
    """Print one JSON object per picture and return the number of unreadable ones."""
    num_bad = 0
    for result in results:
        row: dict[str, object] = {"path": str(result.path)}
        if result.error is None:
            row["labels"] = [score._asdict() for score in result.scores]
        else:
            row["error"] = result.error
            num_bad += 1
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return num_bad


def print_table(results: Iterable[PictureScores]) -> int:
    """Print a table of labels per picture, unreadable pictures on standard error, and return how many those are."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("picture", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("cosine", justify="right", no_wrap=True)
    num_bad = 0
    for result in results:
        if result.error is not None:
            print(f"{result.path}: {result.error}", file=sys.stderr)
            num_bad += 1
        for i, score in enumerate(result.scores):
            style = "bold" if i == 0 else ""
            table.add_row(
                Text(str(result.path) if i == 0 else ""),
                Text(score.label, style=style),
                Text(f"{100 * score.probability:.1f} %", style=style),
                f"{score.cosine:.3f}",
                end_section=score is result.scores[-1],
            )
    if table.row_count:
        Console().print(table)
    return num_bad


def _score(features: Tensor, vectors: Tensor, *, model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Return cosines and probabilities, [n, C] each."""
    cosines = similarity(features, vectors)
    logits = model.logit_scale.float().exp() * cosines
    if model.logit_bias is not None:
        return cosines.cpu(), torch.sigmoid(logits + model.logit_bias.float()).cpu()
    return cosines.cpu(), logits.softmax(dim=1).cpu()


def _batches(
    images: Iterable[Path], *, preprocess: Callable[[Image.Image], Tensor]
) -> Iterator[list[tuple[Path, Tensor | str]]]:
    """Yield files with their pixels [3, S, S], or with the reason why they cannot be read."""
    batch: list[tuple[Path, Tensor | str]] = []
    for path in images:
        try:
            batch.append((path, preprocess(ImageOps.exif_transpose(open_image(path.read_bytes())))))
        except BadSampleError as error:
            batch.append((path, error.reason.replace("_", " ")))
        except (OSError, ValueError, SyntaxError) as error:
            batch.append((path, getattr(error, "strerror", None) or str(error)))
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch
