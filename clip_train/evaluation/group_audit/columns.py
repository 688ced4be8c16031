"""Read which group each image belongs to: from a table by key, or from the `.npy` of each sample."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.data.sequential import ShardImages
from clip_train.data.shards.inputs.table import IMAGE_COLUMNS, read_csv
from clip_train.errors import IntegrityError, UserError, reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clip_train.data.sequential import ImageSource

GROUPS_FILE = "groups.csv"
KEY_COLUMN = "key"
MAX_GROUPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupColumn:
    """One way to divide the images into groups."""

    name: str
    groups: list[str]
    """G names, numbers by value and others by text."""
    of_image: np.ndarray
    """[N] int64 in [0, G), -1 for images without a group."""


def open_columns(
    source: ImageSource,
    *,
    root: str,
    split: str,
    groups: str,
    npy_columns: Sequence[str],
    chosen: Sequence[str],
    values: Mapping[str, Sequence[str]],
    edges: Mapping[str, Sequence[float]],
) -> list[GroupColumn]:
    """Return the columns to audit for the images of `source`; the arguments are the fields of `GroupAuditConfig`.

    Raises:
        UserError: groups are nowhere to be found, a column or an image is missing, or a column does not group.
        IntegrityError: an `.npy` does not hold one integer for each of `npy_columns`.
    """
    places = [Path(root) / split / GROUPS_FILE, Path(root) / GROUPS_FILE] if groups == "auto" else [Path(groups)]
    table = next((path for path in places if path.is_file()), None)
    if table is not None:
        origin, texts = str(table), _from_table(table, source=source, split=split)
    elif groups != "auto":
        raise UserError(f"groups={groups} is not a file")
    elif isinstance(source, ShardImages) and npy_columns:
        origin, texts = f"the .npy of {root}", _from_npy(source, columns=npy_columns, values=values)
    else:
        raise UserError(
            f"{root} tells no groups: put a {GROUPS_FILE} with the column {KEY_COLUMN} there, or name the integers of "
            "each sample's .npy with npy_columns=[…]"
        )
    if strange := [name for name in chosen if name not in texts]:
        raise UserError(f"columns={list(chosen)}: {origin} has no column {strange[0]!r}, only {', '.join(texts)}")
    if unused := [name for name in edges if name not in texts]:
        raise UserError(f"edges names {unused[0]!r}, but {origin} has only {', '.join(texts)}")
    return [
        _ranges(name, texts[name], edges=edges[name], origin=origin)
        if name in edges
        else _column(name, texts[name], origin=origin)
        for name in chosen or texts
    ]


def _ranges(name: str, texts: Sequence[str], *, edges: Sequence[float], origin: str) -> GroupColumn:
    """Return the groups of a column of amounts that lie between the edges."""
    try:
        amounts = np.array([float(text) if text else np.nan for text in texts])
    except ValueError as error:
        raise UserError(f"{origin}: column {name!r} has edges, but not only numbers ({error})") from error
    between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    of_image = np.searchsorted(np.array(edges), amounts, side="left")
    return GroupColumn(
        name=name,
        groups=[f"up to {edges[0]:g}", *between, f"over {edges[-1]:g}"],
        of_image=np.where(np.isnan(amounts), -1, of_image),
    )


def _column(name: str, texts: Sequence[str], *, origin: str) -> GroupColumn:
    distinct = {text for text in texts if text}
    groups = sorted(distinct, key=int if all(text.isdecimal() for text in distinct) else None)
    if not 1 < len(groups) <= MAX_GROUPS:
        raise UserError(
            f"{origin}: column {name!r} has {len(groups)} different values, not 2 to {MAX_GROUPS}; choose others with "
            "columns=[…]"
        )
    place = {group: i for i, group in enumerate(groups)}
    of_image = np.array([place.get(text, -1) for text in texts], dtype=np.int64)
    return GroupColumn(name=name, groups=groups, of_image=of_image)


def _from_table(path: Path, *, source: ImageSource, split: str) -> dict[str, list[str]]:
    """Return the cells of each column in the order of the images."""
    with reading(path):
        columns, rows = read_csv(path, sep=",")
    key_column = next((name for name in (KEY_COLUMN, *IMAGE_COLUMNS) if name in columns), None)
    if key_column is None or len(columns) < 2:
        raise UserError(f"{path} must have the column {KEY_COLUMN} and one per grouping, not {', '.join(columns)}")
    cells: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        key = row[key_column]
        if key in cells:
            raise UserError(f"{path}, row {number}: {key!r} has a row already")
        if None in row.values() or None in row:
            raise UserError(f"{path}, row {number} has not as many cells as there are columns")
        cells[key] = row
    in_order = [
        next((cells[name] for name in _names(source.key(i), source=source, split=split) if name in cells), None)
        for i in range(len(source))
    ]
    if missing := [source.key(i) for i, row in enumerate(in_order) if row is None]:
        raise UserError(f"{path} has no row for {len(missing)} of {len(source)} images, such as {missing[0]}")
    return {
        column: [row[column].strip() for row in in_order if row is not None]
        for column in columns
        if column != key_column
    }


def _names(key: str, *, source: ImageSource, split: str) -> tuple[str, str]:
    """Return what a table may call an image: its path with or without the split, its sample with or without shard."""
    return key, key.partition("/")[2] if isinstance(source, ShardImages) else f"{split}/{key}"


def _from_npy(
    source: ShardImages, *, columns: Sequence[str], values: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {column: [] for column in columns}
    for i in range(len(source)):
        try:
            numbers = np.load(io.BytesIO(source.content(i, "npy")), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise IntegrityError(f"{source.key(i)}: its .npy cannot be read: {error}") from error
        if numbers.shape != (len(columns),) or numbers.dtype.kind not in "iu":
            raise IntegrityError(
                f"{source.key(i)}: its .npy is {numbers.dtype} {list(numbers.shape)}, not {len(columns)} integers for "
                f"npy_columns={list(columns)}"
            )
        for column, number in zip(columns, numbers.tolist(), strict=True):
            texts[column].append(_named(number, column=column, names=values.get(column), key=source.key(i)))
    return texts


def _named(number: int, *, column: str, names: Sequence[str] | None, key: str) -> str:
    if names is None:
        return str(number)
    if not 0 <= number < len(names):
        raise IntegrityError(f"{key}: {column} is {number}, but values.{column} names {len(names)} groups")
    return names[number]
