"""Tables with a column of picture paths and a column of captions: CSV, TSV, JSON lines."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from clip_train.data.shards.inputs.pair import Input, InputOptions, Row, pairs_of_rows
from clip_train.errors import UserError, reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# Names that tables in use have, most telling first.
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "file", "path", "img",
                 "imageRelPath")  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "txt")
_MAX_FIELD_CHARACTERS = 1 << 27  # Python's 131,072 would refuse a table for one text that is too long


def read_table(path: Path, *, options: InputOptions) -> Input:
    """Pair the pictures that a column names with the captions of another one; a caption may be a list of several.

    Picture paths start from `--images`, by default from the table's folder.

    Raises:
        UserError: a column is missing, the file cannot be read, or no row names a picture.
    """
    kind = f"a table ({path.suffix.lower()})"
    names = ["image_col", "caption_col", "images"] + (["sep"] if path.suffix.lower() in (".csv", ".tsv") else [])
    options.refuse_except(*names, kind=kind)
    with reading(path):
        rows = _rows(path, options=options)
    if not rows:
        raise UserError(f"{path} holds no rows")
    return Input(
        kind=kind, pairs=pairs_of_rows(rows, images=options.images or path.parent, keep_repeats=options.keep_repeats)
    )


def choose_column(columns: Sequence[str], *, asked: str | None, usual: Sequence[str], what: str, path: Path) -> str:
    """Return the column that was asked for, or the one with a usual name.

    Raises:
        UserError: there is no such column; the message lists those there are.
    """
    written = {name.strip().lower(): name for name in reversed(columns)}
    column = (
        next((written[name.lower()] for name in usual if name.lower() in written), None) if asked is None else asked
    )
    if column is None or column not in columns:
        which = f"no column {column!r}" if column else f"no column of {what}s with a usual name ({', '.join(usual)})"
        raise UserError(
            f"{path} has {which}; its columns are {', '.join(map(repr, columns)) or 'none'}: pass --{what}-col"
        )
    return column


def _rows(path: Path, *, options: InputOptions) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        records = list(_json_lines(path))
        columns = list(dict.fromkeys(column for record in records for column in record))
    else:
        columns, records = read_csv(path, sep=options.sep or ("\t" if suffix == ".tsv" else ","))
    image = choose_column(columns, asked=options.image_col, usual=IMAGE_COLUMNS, what="image", path=path)
    caption = choose_column(columns, asked=options.caption_col, usual=CAPTION_COLUMNS, what="caption", path=path)
    return rows_of(records, image=image, caption=caption, path=path)


def rows_of(records: Iterable[dict[str, Any]], *, image: str, caption: str, path: Path) -> list[Row]:
    """Return the rows of a table's records. One whose cell is empty or no path names no picture.

    Raises:
        UserError: there are rows, and none names a picture.
    """
    rows, other = [], None
    for number, record in enumerate(records, start=1):
        cell = record.get(image)
        named = isinstance(cell, str) and bool(cell.strip())
        other = cell if other is None and not named else other
        rows.append(Row(cell if named else None, captions_of(record.get(caption)), name=f"row {number} of {path.name}"))
    if rows and not any(row.picture for row in rows):
        raise UserError(f"{path}: no row names a picture: column {image!r} must hold paths of files, not {other!r}")
    return rows


def read_csv(path: Path, *, sep: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns of a CSV file, and its rows by column. `\\t` is a tab.

    Raises:
        UserError: the separator is no character, or a line cannot be taken apart.
    """
    sep = "\t" if sep == r"\t" else sep
    if len(sep) != 1:
        raise UserError(f"--sep {sep!r} must be one character")
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: a quote that nothing closes would take the rows up to the next quote for one text.
        reader = csv.DictReader(file, delimiter=sep, strict=True)
        records = []
        try:
            for record in reader:
                if None in record:
                    raise UserError(
                        f"{path}, line {reader.line_num} has more fields than the {len(reader.fieldnames or [])} "
                        f"columns: a text with {sep!r} in it needs quotes around it"
                    )
                records.append(record)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.reader.line_num}: {error}: a text that begins with a quote needs "
                "quotes around it, and its own doubled"
            ) from error
        return list(reader.fieldnames or []), records


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is not a JSON object: {line[:60]!r}")
            yield record


def captions_of(value: object) -> list[str | None]:
    """Return the captions of a cell, none if it is empty; None stands for one that is no text."""
    if value is None:
        return []
    captions: list[Any] = value if isinstance(value, list) else [value]
    return [caption if isinstance(caption, str) else None for caption in captions]
