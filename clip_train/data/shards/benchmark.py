"""clip-benchmark's `wds/` layout of an evaluation set: find its shards, tell its kind, write it.

ROOT/classnames.txt, ROOT/zeroshot_classification_templates.txt, ROOT/dataset_type.txt, and for each split
ROOT/SPLIT/nshards.txt and 0.tar, 1.tar … of samples with a picture and a label.
"""

from __future__ import annotations

import io
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clip_train.data.files import write_atomically
from clip_train.data.images.decode import BadSampleError, open_image, to_rgb
from clip_train.data.images.folder import is_hidden
from clip_train.data.shards.writer import ShardWriter
from clip_train.errors import IntegrityError, UserError, writing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
SAMPLES_PER_SHARD = 10_000
_TYPE = "dataset_type.txt"
_COUNT = "nshards.txt"
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
# clip-benchmark's reader decodes no other formats.
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Kind(StrEnum):
    """What a sample of the set has besides its picture."""

    classification = "classification"  # .cls, the number of its class
    multilabel = "multilabel"  # .npy, 1 for every class it belongs to
    retrieval = "retrieval"  # .txt, its captions, one per line


LABEL_EXTENSION = {Kind.classification: "cls", Kind.multilabel: "npy", Kind.retrieval: "txt"}


class LabelledPicture(NamedTuple):
    """A sample to write."""

    name: str  # for messages
    picture: bytes
    label: bytes  # content of the member that the kind of the set asks for


def has_layout(root: Path, *, split: str) -> bool:
    """Return whether the folder holds the split of a set in this layout."""
    return (root / split / _COUNT).is_file()


def splits_of(root: Path) -> list[str]:
    """Return the splits of a set, in this layout or as folders that are all named as splits are; none if neither."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    ours = [name for name in folders if has_layout(root, split=name)]
    return ours or (folders if set(folders) <= _SPLITS else [])


def kind_of(root: Path) -> Kind:
    """Return the kind of a set.

    Raises:
        UserError: its file names another one.
    """
    path = root / _TYPE
    text = path.read_text(encoding="utf-8").strip().lower() if path.is_file() else Kind.classification.value
    try:
        return Kind(text)
    except ValueError as error:
        raise UserError(f"{path} must say {', '.join(Kind)}, not {text!r}") from error


def layout_shards(root: Path, *, split: str) -> list[Path]:
    """Return the shards of a split, in order.

    Raises:
        UserError: their number is not stated.
    """
    path = root / split / _COUNT
    text = path.read_text(encoding="utf-8").strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{path} must hold the number of shards, not {text!r}")
    return [root / split / f"{i}.tar" for i in range(int(text))]


def write_layout(
    root: Path,
    samples: Iterable[LabelledPicture],
    *,
    kind: Kind,
    split: str = "test",
    classnames: Sequence[str] = (),
    templates: Sequence[str] = (),
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> int:
    """Write a set and return its number of samples. Its `nshards.txt` comes last: without it the set is not there.

    Args:
        root: folder of the set; it may hold other splits.
        samples: in order. Pictures that are not JPEG, PNG or WebP become PNG.
        kind: of the labels.
        split: which part of the set.
        classnames: of all classes, not for retrieval.
        templates: with `{c}` or `{}` for the class name.
        samples_per_shard: of all shards but the last.

    Raises:
        UserError: the split is already there, or the folder cannot be written.
        IntegrityError: a picture cannot be read.
    """
    folder = root / split
    if has_layout(root, split=split):
        raise UserError(f"{folder} already holds a set: remove it or choose another folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if classnames:
            _write_lines(root / CLASSNAMES, classnames)
        if templates:
            _write_lines(root / TEMPLATES, [template.replace("{}", "{c}") for template in templates])
        if kind is not Kind.classification:
            _write_lines(root / _TYPE, [kind.value])
        num_samples, num_shards = 0, 0
        writer: ShardWriter | None = None
        for sample in samples:
            if num_samples % samples_per_shard == 0:
                if writer is not None:
                    writer.publish()
                writer = ShardWriter(folder / f"{num_shards}.tar")
                num_shards += 1
            assert writer is not None
            extension, picture = _readable(sample)
            writer.write(f"s{num_samples:07d}", {extension: picture, LABEL_EXTENSION[kind]: sample.label})
            num_samples += 1
        if writer is not None:
            writer.publish()
        _write_lines(folder / _COUNT, [str(num_shards)])
    return num_samples


def multi_hot(classes: Sequence[int], *, num_classes: int) -> bytes:
    """Return the `.npy` member of a picture that belongs to several classes."""
    values = np.zeros(num_classes, dtype=np.int64)
    values[list(classes)] = 1
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _readable(sample: LabelledPicture) -> tuple[str, bytes]:
    try:
        picture = open_image(sample.picture)
        if picture.format in _EXTENSIONS:
            return _EXTENSIONS[picture.format], sample.picture
        buffer = io.BytesIO()
        to_rgb(picture).save(buffer, "PNG")
        return "png", buffer.getvalue()
    except (BadSampleError, OSError, ValueError, SyntaxError) as error:
        raise IntegrityError(f"{sample.name} cannot be decoded: {error}") from error


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
