"""Labelled images in a table with a column of picture paths and a column of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_train.data.sequential import FileImages
from clip_train.data.shards.inputs.table import IMAGE_COLUMNS, read_csv, readable
from clip_train.errors import UserError
from clip_train.evaluation.classify.class_names import names_from, parse_class, prompts_from
from clip_train.evaluation.classify.labelled_images import LabelledImages

TABLE_SUFFIXES = (".csv", ".tsv")
LABEL_COLUMNS = ("label", "class", "classname", "class_name", "category", "target", "cls")


def open_table(path: Path, *, classnames: str, templates: str, label_column: str | None = None) -> LabelledImages:
    """Open a table of picture paths, which start at its folder, and of classes by name or number.

    Raises:
        UserError: a column is missing, or the labels and the class names do not fit together.
    """
    with readable(path):
        columns, rows = read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    image = _column(columns, usual=IMAGE_COLUMNS, what="picture paths", path=path)
    usual = LABEL_COLUMNS if label_column is None else (label_column,)
    label = _column(columns, usual=usual, what="labels", path=path)
    if not rows:
        raise UserError(f"{path} holds no rows")
    texts = [str(row[label] or "").strip() for row in rows]
    names = names_from(classnames, root=path.parent)
    if names is None:
        if all(text.isdecimal() for text in texts):
            raise UserError(f"{path} names its classes by number: say what they are with classnames=FILE")
        names = sorted(set(texts))
    return LabelledImages(
        source=FileImages([path.parent / str(row[image]) for row in rows], folder=path.parent),
        labels=_classes_of(texts, names=names, path=path),
        classnames=names,
        templates=prompts_from(templates, root=path.parent, classnames=names),
    )


def _column(columns: Sequence[str], *, usual: Sequence[str], what: str, path: Path) -> str:
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise UserError(f"{path} has the columns {', '.join(columns) or 'none'}: {what} go under {' or '.join(usual)}")
    return found


def _classes_of(texts: Sequence[str], *, names: Sequence[str], path: Path) -> np.ndarray:
    counts = Counter(names)
    place = {name: i for i, name in enumerate(names)}
    labels = np.empty(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        if counts[text] > 1:
            raise UserError(
                f"{path}, row {i + 1}: {text!r} is the name of {counts[text]} classes: give their numbers instead"
            )
        number = place[text] if text in place else parse_class(text, num_classes=len(names))
        if number is None:
            raise UserError(
                f"{path}, row {i + 1}: {text!r} is neither one of the {len(names)} class names nor the number of one"
            )
        labels[i] = number
    return labels
