"""Tell what an input is, and list its pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.data.shards.inputs.coco import read_coco
from clip_train.data.shards.inputs.folder import has_pictures, read_class_folders, read_folder
from clip_train.data.shards.inputs.parquet import find_tables, read_parquet
from clip_train.data.shards.inputs.table import TABLE_SUFFIXES, read_table
from clip_train.data.shards.inputs.tars import read_tars
from clip_train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.data.shards.inputs.pair import Input, InputOptions


def read_input(source: Path, *, options: InputOptions) -> Input:
    """List the pairs of a table, a COCO file, a folder of shards, of tables, of classes, or of pictures with captions.

    Raises:
        UserError: the input is none of these, or an option does not fit it.
    """
    if source.suffix.lower() == ".parquet" and (tables := [source] if source.exists() else find_tables(source)):
        return read_parquet(tables, options=options)
    if source.is_dir():
        if any(source.glob("*.tar")):
            return read_tars(source, options=options)
        if options.template is not None:
            return read_class_folders(source, options=options)
        if (tables := find_tables(source)) and not has_pictures(source):
            return read_parquet(tables, options=options)
        return read_folder(source, options=options)
    if not source.exists():
        what = "shards are made of local files only" if ":/" in str(source) else "it is not a folder and not a file"
        raise UserError(f"{source} does not exist: {what}")
    suffix = source.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return read_table(source, options=options)
    if suffix == ".json":
        return read_coco(source, options=options)
    raise UserError(
        f"{source} is none of the inputs: a folder of pictures with .txt captions, of classes (--template) or of .tar "
        f"shards, a table ({', '.join(TABLE_SUFFIXES)}, .parquet), or COCO captions (.json)"
    )
