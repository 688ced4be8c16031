"""Open a set of choices: rows of JSON beside a folder of pictures, or shards."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_train.errors import IntegrityError, UserError, reading
from clip_train.evaluation.choose.choices import Choice, ChoiceSet, kind_and_pairs
from clip_train.evaluation.choose.order import clean, reorder, take_apart
from clip_train.evaluation.choose.rows import Picture, Row, against_others, captions_and_answer, read_row

if TYPE_CHECKING:
    from clip_train.data.remote.cache import ShardCache

JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*JSON_SUFFIXES, ".csv")
IMAGE_FOLDERS = ("val2017", "images", "winogavil_images")
EXTENSIONS = ("", ".png", ".jpg", ".jpeg", ".webp")  # tried in turn: Winoground names its pictures without one


class Found(NamedTuple):
    """A row and where it stands."""

    place: str
    row: Row | None
    """None if it asks nothing."""


class PictureFiles:
    """Pictures by name, whole or a part of each.

    Args:
        folders: where they may be, the likeliest first.
        pictures: names below one of `folders`, and boxes; each is one picture of the source.

    Raises:
        UserError: a name leads out of the folders, or there is no such file.
    """

    def __init__(self, folders: Sequence[Path], pictures: Sequence[Picture]) -> None:
        self._folders = folders
        self._pictures = pictures
        self._files = {name: self._find(name) for name in dict.fromkeys(picture.name for picture in pictures)}

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> bytes:
        """Return the encoded picture; a part of one as PNG.

        Raises:
            UserError: the file cannot be read.
        """
        picture = self._pictures[index]
        file = self._files[picture.name]
        with reading(file):
            content = file.read_bytes()
        if picture.box is None:
            return content
        from clip_train.data.images.decode import open_image

        part = io.BytesIO()
        open_image(content).convert("RGB").crop(picture.box).save(part, format="PNG", compress_level=1)
        return part.getvalue()

    def key(self, index: int) -> str:
        """Return the name of the picture below the folder."""
        return self._pictures[index].name

    def _find(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"picture {name!r} must lie below {self._folders[0]}")
        for folder in self._folders:
            for extension in EXTENSIONS:
                if (file := folder / f"{name}{extension}").is_file():
                    return file
        raise UserError(f"{self._folders[0] / name} is not there; images=DIR says where the pictures are")


def find_rows(path: str) -> list[Path]:
    """Return the files of rows that `path` names: one, or those of a folder (its `.csv` if no others); [] for shards.

    Raises:
        UserError: the file is not there.
    """
    place = Path(path)
    if place.is_file() and place.suffix != ".tar":
        return [place]
    files = sorted(place.iterdir()) if place.is_dir() else []
    for suffixes in (JSON_SUFFIXES, SUFFIXES):
        if rows := [file for file in files if file.suffix in suffixes]:
            return rows
    if place.suffix in SUFFIXES:
        raise UserError(f"path={path} is not there")
    return []


def open_choices(path: str, *, images: str | None, cache: ShardCache | None = None) -> ChoiceSet:
    """Open the items that `ChooseConfig` names; without a cache remote shards are refused.

    Raises:
        UserError: there are none, a row cannot be understood, its picture is not there, or the kinds are mixed.
        IntegrityError: a shard is damaged.
    """
    files = find_rows(path)
    if not files:
        return _open_shards(path, cache=cache)
    found = [one for file in files for one in _rows(file, tag=file.stem if len(files) > 1 else None)]
    rows = [(one.place, one.row) for one in found if one.row is not None]
    if not rows:
        raise UserError(f"path={path} holds no items")
    pictures = {picture: i for i, picture in enumerate(dict.fromkeys(p for _, row in rows for p in row.pictures))}
    folders = _image_folders(files[0].parent) if images is None else [Path(images)]
    choices = _make(rows, [tuple(pictures[p] for p in row.pictures) for _, row in rows],
                    source=PictureFiles(folders, list(pictures)))  # fmt: skip
    if silent := len(found) - len(rows):
        choices.warnings.append(f"{silent} captions have no other order than their own, and are left out")
    return choices


def _open_shards(path: str, *, cache: ShardCache | None) -> ChoiceSet:
    from clip_train.data.sequential import ShardImages
    from clip_train.data.shard_file import find_files

    source = ShardImages(find_files(path, field="path", cache=cache))
    rows = []
    for i in range(len(source)):
        content = _parse(source.text(i, "json"), place=source.key(i))
        if not isinstance(content, dict):
            raise IntegrityError(f"{source.key(i)}.json is no JSON object")
        captions, answer, tags = _in_place(source.key(i), partial(captions_and_answer, content))
        rows.append((source.key(i), Row([Picture(source.key(i))], captions, answer, tags)))
    return _make(rows, [(i,) for i in range(len(rows))], source=source)


def _make(rows: Sequence[tuple[str, Row]], pictures: Sequence[tuple[int, ...]], *, source: Any) -> ChoiceSet:
    """Make the items of rows, with where each stands, and of the places of their pictures."""
    items: list[Choice] = []
    for (place, row), places in zip(rows, pictures, strict=True):
        kind, right = _in_place(
            place,
            partial(kind_and_pairs, row.answer, num_pictures=len(places), num_captions=len(row.captions)),
        )
        items.append(
            Choice(pictures=places, captions=tuple(row.captions), kind=kind, right=right, tags=tuple(row.tags))
        )
        if kind is not items[0].kind:
            raise UserError(
                f"{place} asks for {kind.value}, {rows[0][0]} for {items[0].kind.value}: they need two sets"
            )
    return ChoiceSet(source=source, items=items, keys=[place for place, _ in rows])


def _rows(file: Path, *, tag: str | None) -> Iterator[Found]:
    """Yield the rows of a file; where there are several files, the name of each is a tag."""
    with reading(file):
        text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".csv":
        rows = [(f"{file.name}, row {n}", row) for n, row in enumerate(csv.DictReader(io.StringIO(text)), start=1)]
    elif file.suffix == ".jsonl":
        lines = ((f"{file.name}:{n}", line) for n, line in enumerate(text.splitlines(), start=1) if line.strip())
        rows = [(place, _parse(line, place=place)) for place, line in lines]
    else:
        content = _parse(text, place=str(file))
        named = (
            content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
        )
        rows = [(f"{file.name}:{name}", row) for name, row in named]
    if rows and _is_captioned(rows[0][1]):
        found = list(_other_orders(rows))
    else:
        found = [Found(place, _in_place(place, partial(read_row, row))) for place, row in rows]
    for place, read in found:
        yield Found(place, read._replace(tags=[tag, *read.tags]) if tag and read else read)


def _is_captioned(row: object) -> bool:
    """Return whether a row is of the files of captions that ARO's orders are drawn from, and not a choice itself."""
    return isinstance(row, dict) and isinstance(row.get("caption"), list)


def _other_orders(rows: Sequence[tuple[str, Any]]) -> Iterator[Found]:
    """Yield for each caption of each picture the choice between it and its words in other orders."""
    captioned = [
        (f"{place}, caption {n}", str(row.get("image")), caption)
        for place, row in rows
        for n, caption in enumerate(_captions(row, place=place), start=1)
    ]
    words = take_apart(caption for *_, caption in captioned)
    for i, ((place, name, caption), taken_apart) in enumerate(zip(captioned, words, strict=True)):
        others = [clean(other) for other in reorder(taken_apart, place=i)]
        yield Found(place, against_others(Picture(name), clean(caption), others))


def _captions(row: object, *, place: str) -> list[str]:
    if isinstance(row, dict) and isinstance(row.get("image"), str):
        captions = row.get("caption")
        if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
            return captions
    raise UserError(f"{place}: it must have an `image` and a list `caption` of texts")


def _parse(text: str, *, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error


def _in_place(place: str, read: Any) -> Any:
    try:
        return read()
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _image_folders(folder: Path) -> list[Path]:
    return [*(folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder]
