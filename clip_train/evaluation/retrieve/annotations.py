"""Images with captions that one file lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from clip_train.data.sequential import FileImages
from clip_train.data.shards.inputs.coco import read_coco
from clip_train.data.shards.inputs.pair import Absent, InputOptions, Pair, Row, pairs_of_rows
from clip_train.data.shards.inputs.parquet import Cell, read_parquet
from clip_train.data.shards.inputs.table import TABLE_SUFFIXES, read_table
from clip_train.errors import UserError, reading
from clip_train.evaluation.retrieve.captioned_images import CaptionedImages, captioned_images

# Captions of such lines hold commas and quotation marks that mean nothing.
_LINE = re.compile(r"(.+?\.(?:jpe?g|png|webp)),(.*)", re.IGNORECASE)


def open_annotations(annotations: str, *, images: str | None, split: str) -> CaptionedImages:
    """Open the images that a file lists; the arguments are the fields of `RetrieveConfig`.

    Raises:
        UserError: the file is none of the known kinds, or cannot be read.
        IntegrityError: an image has no caption.
    """
    path = Path(annotations).expanduser()
    folder = Path(images).expanduser() if images is not None else None
    options = InputOptions(images=folder, keep_repeats=True)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        pairs = read_table(path, options=options).pairs
    elif suffix == ".parquet":
        pairs = _pairs_of_files(path, options=options)
    elif suffix == ".txt":
        pairs = pairs_of_rows(_lines(path), images=folder or path.parent, keep_repeats=True)
    elif suffix == ".json":
        document = _document(path)
        if "annotations" in document:
            pairs = read_coco(path, options=options).pairs
        else:
            rows = _karpathy(document, split=split, path=path)
            pairs = pairs_of_rows(rows, images=folder or path.parent, keep_repeats=True)
    else:
        raise UserError(
            f"annotations={annotations} must be a .json, a .txt or a table ({', '.join(TABLE_SUFFIXES)}, .parquet)"
        )
    bad = next((pair.name for pair in pairs if isinstance(pair.image, Absent) or None in pair.captions), None)
    if bad is not None:
        raise UserError(f"annotations={path}: {bad} needs the path of a picture, and captions that are texts")
    source = FileImages([pair.image.path for pair in pairs], folder=folder or path.parent)
    return captioned_images(source, [[str(caption) for caption in pair.captions] for pair in pairs])


def _pairs_of_files(path: Path, *, options: InputOptions) -> list[Pair]:
    pairs = read_parquet([path], options=options).pairs
    if any(isinstance(pair.image, Cell) for pair in pairs):
        raise UserError(
            f"annotations={path} holds the pictures themselves: `clip-train shards make` turns it into shards"
        )
    return pairs


def _document(path: Path) -> dict[str, Any]:
    with reading(path):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UserError(f"{path} has no list `images`: it is neither COCO captions nor Karpathy's splits")
    return document


def _karpathy(document: dict[str, Any], *, split: str, path: Path) -> list[Row]:
    """Return the captions of each picture of a split, with its path (`filepath/filename`, as for COCO)."""
    try:
        rows = [
            Row(
                "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                [s["raw"] for s in image["sentences"]],
            )
            for image in document["images"]
            if image["split"] == split
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is neither COCO captions (`images`, `annotations`) nor Karpathy's splits (`images` with "
            f"`filename`, `split` and `sentences`): {type(error).__name__} {error}"
        ) from error
    if not rows:
        known = sorted({str(image.get("split")) for image in document["images"]})
        raise UserError(f"{path} has no pictures of split={split}, only of {', '.join(known) or 'none'}")
    return rows


def _lines(path: Path) -> list[Row]:
    with reading(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line.strip())
        if found:
            rows.append(Row(found[1], [found[2]]))
        elif line.strip() and number > 1:  # the first may be a heading
            raise UserError(f"{path}, line {number} is not `picture.jpg,caption`: {line[:60]!r}")
    if not rows:
        raise UserError(f"{path} holds no line `picture.jpg,caption`")
    return rows
