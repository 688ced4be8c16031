"""COCO captions: one JSON file that lists pictures and, by their number, captions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from clip_train.data.shards.inputs.pair import Input, InputOptions, Row, pairs_of_rows
from clip_train.data.shards.inputs.table import captions_of
from clip_train.errors import UserError, reading

if TYPE_CHECKING:
    from pathlib import Path


def read_coco(path: Path, *, options: InputOptions) -> Input:
    """Pair the pictures of a COCO file with their captions, usually five each.

    The pictures are looked for in `--images`, else beside the file and in a folder named after it (`train2017` for
    `captions_train2017.json`), beside the file or one folder up.

    Raises:
        UserError: the file is not one of COCO captions, or the folder of the pictures is not found.
    """
    kind = "COCO captions"
    options.refuse_except("images", kind=kind)
    with reading(path):
        content = path.read_bytes()
    try:
        document: Any = json.loads(content)
        names: dict[Any, str] = {image["id"]: image["file_name"] for image in document["images"]}
        notes = [(note["image_id"], note["caption"]) for note in document["annotations"]]
        unknown = [number for number, _ in notes if number not in names]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a file of COCO captions: it needs `images` with `id` and `file_name`, and `annotations` "
            f"with `image_id` and `caption` ({type(error).__name__}: {error})"
        ) from error
    if unknown:
        raise UserError(
            f"{path}: {len(unknown):,} captions are of pictures that `images` lacks, such as {unknown[0]!r}"
        )
    if not names:
        raise UserError(f"{path} lists no pictures")
    images = options.images or _folder_of(next(iter(names.values())), path=path)
    by_name: dict[str, list[str | None]] = {name: [] for name in names.values()}
    for number, caption in notes:
        by_name[names[number]] += [text and text.strip() for text in captions_of(caption)]
    rows = (Row(name, captions) for name, captions in by_name.items())
    return Input(kind=kind, pairs=pairs_of_rows(rows, images=images, keep_repeats=options.keep_repeats))


def _folder_of(name: str, *, path: Path) -> Path:
    split = path.stem.removeprefix("captions_")
    candidates = (path.parent, path.parent / split, path.parent.parent / split)
    found = next((folder for folder in candidates if (folder / name).exists()), None)
    if found is None:
        raise UserError(
            f"{path}: its first picture {name} is in none of {', '.join(map(str, candidates))}: pass --images FOLDER"
        )
    return found
