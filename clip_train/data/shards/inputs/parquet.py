"""Parquet tables: with paths of pictures, or with the pictures themselves, as Hugging Face's and img2dataset's have.

Pictures inside a table are not read when it is listed, and never more than a few of them at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_train.data.images.decode import BadSampleError
from clip_train.data.shards.inputs.pair import Input, InputOptions, Pair, Row, pairs_of_rows
from clip_train.data.shards.inputs.table import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    captions_of,
    choose_column,
    rows_of,
)
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# img2dataset names the column after the format.
_PICTURE_COLUMNS = (*IMAGE_COLUMNS, "jpg", "png", "webp")
_BYTES = "bytes"  # Hugging Face's pictures are {bytes, path}
_ROWS_AT_A_TIME = 16
_BUFFER_BYTES = 1 << 20
_SPLIT = re.compile(r"(.+)-\d+-of-\d+\b.*\.parquet")  # Hugging Face's names


class Cell(NamedTuple):
    """A picture inside a table."""

    path: Path
    column: str  # with the field, such as `image.bytes`
    row_group: int
    row: int  # in the row group

    def read(self) -> bytes | None:
        """Return the picture; None if the cell is empty. What lies before it in the row group is read too.

        Raises:
            BadSampleError: the table cannot be read.
        """
        pictures = pictures_of(self.path, column=self.column, row_group=self.row_group)
        return next(content for row, content in enumerate(pictures) if row == self.row)


def find_tables(source: Path) -> list[Path]:
    """Return the parquet files that a folder holds or a pattern (`data/train-*.parquet`) names; [] if it is neither.

    Raises:
        UserError: they are several splits of a data set.
    """
    found = sorted(source.glob("*.parquet") if source.is_dir() else source.parent.glob(source.name))
    tables = [path for path in found if path.suffix == ".parquet"]
    splits = sorted({match[1] for path in tables if (match := _SPLIT.fullmatch(path.name))})
    if len(splits) > 1:
        raise UserError(
            f"{source} names {len(splits)} splits, {', '.join(splits)}: choose one, as in "
            f"'{tables[0].parent / splits[-1]}-*.parquet'"
        )
    return tables


def read_parquet(paths: Sequence[Path], *, options: InputOptions) -> Input:
    """Pair the pictures of a column with the captions of another one; a caption may be a list of several.

    A picture is a path, which starts from `--images` or the table's folder, or lies in the table: as bytes, or as
    `{bytes, path}`. Of pictures inside a table every row is a pair of its own.

    Args:
        paths: the files of one table.
        options: columns, and where paths start.

    Raises:
        UserError: a column is missing or of another type, or a file cannot be read.
    """
    pairs: list[Pair] = []
    rows: list[Row] = []
    for path in paths:
        columns, types = _schema(path)
        usual = {"image": _PICTURE_COLUMNS, "caption": CAPTION_COLUMNS}
        image = choose_column(columns, asked=options.image_col, usual=usual["image"], what="image", path=path)
        caption = choose_column(columns, asked=options.caption_col, usual=usual["caption"], what="caption", path=path)
        _require_texts(caption, types[caption], path=path)
        inside = _column_of_bytes(image, types[image], path=path)
        if inside is None:
            rows += rows_of(_records(path, columns=[image, caption]), image=image, caption=caption, path=path)
        else:
            pairs += _pairs_inside(path, column=inside, caption=caption)
    kind = f"a table ({'.parquet' if len(paths) == 1 else f'{len(paths)} files .parquet'})"
    if pairs:
        kind += " with the pictures inside"
    options.refuse_except("image_col", "caption_col", *(() if pairs else ("images",)), kind=kind)
    images = options.images or paths[0].parent
    pairs += pairs_of_rows(rows, images=images, keep_repeats=options.keep_repeats)
    if not pairs:
        raise UserError(f"{paths[0]} holds no rows")
    return Input(kind=kind, pairs=pairs)


def pictures_of(path: Path, *, column: str, row_group: int) -> Iterator[bytes | None]:
    """Yield the pictures of a row group in order, a few in memory at a time; None for an empty cell.

    Raises:
        BadSampleError: the table cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            batches = table.iter_batches(_ROWS_AT_A_TIME, columns=[column], row_groups=[row_group], use_threads=False)
            for batch in batches:
                for cell in batch.column(0):
                    value: Any = cell.as_py()
                    yield value.get(_BYTES) if isinstance(value, dict) else value
    except (pyarrow.ArrowException, OSError) as error:
        raise BadSampleError("unreadable") from error


def _schema(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the columns of a table and their types."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('parquet files need pyarrow: pip install "clip-train[tables]"') from error
    try:
        schema = pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return schema.names, {field.name: field.type for field in schema}


def _require_texts(name: str, kind: Any, *, path: Path) -> None:
    from pyarrow import types

    item = kind
    while (
        types.is_list(item) or types.is_large_list(item) or types.is_fixed_size_list(item) or types.is_dictionary(item)
    ):
        item = item.value_type
    if not (types.is_string(item) or types.is_large_string(item) or types.is_null(item)):
        raise UserError(f"{path}: column {name!r} is of type {kind}; captions are texts or lists of texts")


def _column_of_bytes(name: str, kind: Any, *, path: Path) -> str | None:
    """Return the column of a picture's bytes, None if a column holds paths.

    Raises:
        UserError: it holds neither.
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return None
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    if types.is_struct(kind) and _BYTES in {field.name for field in kind}:
        return f"{name}.{_BYTES}"
    raise UserError(
        f"{path}: column {name!r} is of type {kind}; pictures are paths, bytes, or {{bytes, path}} as Hugging Face's "
        "datasets have them"
    )


def _pairs_inside(path: Path, *, column: str, caption: str) -> Iterator[Pair]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    places = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    records = _records(path, columns=[caption])
    for number, (place, record) in enumerate(zip(places, records, strict=True), start=1):
        captions = tuple(dict.fromkeys(captions_of(record[caption])))
        yield Pair(f"{path.name}/{number:09d}", Cell(path, column, *place), captions)


def _records(path: Path, *, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
