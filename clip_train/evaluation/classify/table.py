"""Labelled images in a table with a column of picture paths and a column of labels."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_train.data.sequential import FileImages
from clip_train.data.shards.inputs.table import IMAGE_COLUMNS, read_csv
from clip_train.errors import UserError, reading
from clip_train.evaluation.classify.class_names import names_from, parse_class, prompts_from
from clip_train.evaluation.classify.labelled_images import LabelledImages

TABLE_SUFFIXES = (".csv", ".tsv")
LABEL_COLUMNS = ("label", "class", "classname", "class_name", "category", "target", "cls")


def open_table(path: Path, *, classnames: str, templates: str, label_column: str | None = None) -> LabelledImages:
    """Open a table of picture paths, which start at its folder or at `images/` there, and of classes by name or number.

    A label may be a list of one, `['stove']`; pictures with another number of labels are left out, with a warning.

    Raises:
        UserError: a column is missing, or the labels and the class names do not fit together.
    """
    with reading(path):
        columns, rows = read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    image = _column(columns, usual=IMAGE_COLUMNS, what="picture paths", path=path)
    usual = LABEL_COLUMNS if label_column is None else (label_column,)
    label = _column(columns, usual=usual, what="labels", path=path)
    if not rows:
        raise UserError(f"{path} holds no rows")
    labels = [_labels_of(str(row[label] or "").strip()) for row in rows]
    kept = [i for i, several in enumerate(labels) if len(several) == 1]
    if not kept:
        raise UserError(f"{path}: no picture has just one label under {label}")
    texts = [labels[i][0] for i in kept]
    names = names_from(classnames, root=path.parent)
    if names is None and all(text.isdecimal() for text in texts):
        raise UserError(f"{path} names its classes by number: say what they are with classnames=FILE")
    in_order = sorted(set(texts)) if names is None else names
    shown = [name.replace("_", " ") for name in in_order] if names is None else names
    left_out = len(rows) - len(kept)
    pictures = [str(rows[i][image]) for i in kept]
    folder = _folder_of(pictures[0], table=path)
    return LabelledImages(
        source=FileImages([folder / name for name in pictures], folder=folder),
        labels=_classes_of(texts, names=in_order, rows=kept, path=path),
        classnames=shown,
        templates=prompts_from(templates, root=path.parent, classnames=shown),
        warnings=[f"{left_out:,} of {len(rows):,} pictures have not just one label: left out"] if left_out else [],
    )


def _column(columns: Sequence[str], *, usual: Sequence[str], what: str, path: Path) -> str:
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise UserError(f"{path} has the columns {', '.join(columns) or 'none'}: {what} go under {' or '.join(usual)}")
    return found


def _folder_of(name: str, *, table: Path) -> Path:
    """Return where the pictures' names start: at the table, or at `images/` there if the first one is only there."""
    below = table.parent / "images"
    return below if not (table.parent / name).is_file() and (below / name).is_file() else table.parent


def _labels_of(text: str) -> list[str]:
    """Return the labels in a cell: itself, or those of a list as Python or JSON writes it (Dollar Street)."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [text]
    return [str(label) for label in found] if isinstance(found, list) else [text]


def _classes_of(texts: Sequence[str], *, names: Sequence[str], rows: Sequence[int], path: Path) -> np.ndarray:
    """Return the classes [N] of labels; `rows` says where each stands, for messages."""
    counts = Counter(names)
    place = {name: i for i, name in enumerate(names)}
    labels = np.empty(len(texts), dtype=np.int64)
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if counts[text] > 1:
            raise UserError(
                f"{path}, row {row + 1}: {text!r} is the name of {counts[text]} classes: give their numbers instead"
            )
        number = place[text] if text in place else parse_class(text, num_classes=len(names))
        if number is None:
            raise UserError(
                f"{path}, row {row + 1}: {text!r} is neither one of the {len(names)} class names nor the number of one"
            )
        labels[i] = number
    return labels
