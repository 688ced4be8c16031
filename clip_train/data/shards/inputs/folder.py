"""Folders of pictures: a caption file beside each picture, or a folder per class."""

from __future__ import annotations

from collections import Counter
from itertools import filterfalse
from typing import TYPE_CHECKING

from clip_train.data.images.folder import files_below, is_picture, pictures_below
from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.data.shards.inputs.pair import Absent, Content, Input, InputOptions, Pair
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_EXTRAS = ("cls", "json")
_COMPANIONS = ("txt", *_EXTRAS)


def read_folder(folder: Path, *, options: InputOptions) -> Input:
    """Pair every picture below a folder with the `.txt` of the same name; `.cls` and `.json` come along.

    A `.txt` without a picture is a pair as well, which cannot be used.

    Raises:
        UserError: there are no pictures, or none has a caption file.
    """
    kind = "a folder of pictures with .txt captions"
    options.refuse_except(kind=kind)
    pictures, others = _files(folder)
    # Whatever the case of the endings: cameras write `A.JPG`, and so `A.TXT`.
    companions = {key: path for path in others if (key := _stem_and_extension(path))[1] in _COMPANIONS}
    captions = {picture: companions.get((picture.with_suffix(""), "txt")) for picture in pictures}
    if not any(captions.values()):
        raise UserError(
            f"{folder}: none of {len(pictures):,} pictures has a .txt of the same name beside it, such as "
            f"{pictures[0].with_suffix('.txt')}; for folders named after classes pass --template 'a photo of a {{}}'"
        )
    pairs = [
        Pair(
            picture.relative_to(folder).as_posix(),
            Content(picture),
            Content(caption or picture.with_suffix(".txt")),
            tuple(
                (extension, Content(companions[key]))
                for extension in _EXTRAS
                if (key := (picture.with_suffix(""), extension)) in companions
            ),
        )
        for picture, caption in captions.items()
    ]
    captioned = set(captions.values())
    alone = [path for (_, kind), path in companions.items() if kind == "txt" and path not in captioned]
    pairs += [Pair(path.relative_to(folder).as_posix(), Absent(path), Content(path)) for path in alone]
    return Input(kind=kind, pairs=pairs, ignored=_extensions(set(others) - set(companions.values())))


def read_class_folders(folder: Path, *, options: InputOptions) -> Input:
    """Caption the pictures below each class' folder by a template; `cls` is the class' place in order of names.

    Raises:
        UserError: there are no pictures, one lies outside the classes' folders, or the template has no `{}`.
    """
    kind = "folders of pictures named after their classes"
    options.refuse_except("template", kind=kind)
    template = options.template or ""
    if template.count("{}") != 1:
        raise UserError(f"--template {template!r} must hold {{}} once, for the name of the class")
    pictures, others = _files(folder)
    outside = next((picture for picture in pictures if picture.parent == folder), None)
    if outside is not None:
        raise UserError(f"{outside} lies in no class' folder, so --template cannot caption it")
    class_of = {picture: picture.relative_to(folder).parts[0] for picture in pictures}
    number_of = {name: number for number, name in enumerate(sorted(set(class_of.values())))}
    pairs = [
        Pair(
            picture.relative_to(folder).as_posix(),
            Content(picture),
            (template.replace("{}", class_of[picture].replace("_", " ")),),
            (("cls", str(number_of[class_of[picture]]).encode()),),
        )
        for picture in pictures
    ]
    return Input(kind=f"{kind} ({len(number_of):,} classes)", pairs=pairs, ignored=_extensions(others))


def has_pictures(folder: Path) -> bool:
    """Return whether there are pictures below a folder."""
    return next(pictures_below(folder), None) is not None


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the pictures below a folder and the other files, each in order."""
    files = sorted(files_below(folder))
    pictures = list(filter(is_picture, files))
    if not pictures:
        raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")
    return pictures, list(filterfalse(is_picture, files))


def _stem_and_extension(path: Path) -> tuple[Path, str]:
    return path.with_suffix(""), path.suffix.lower().removeprefix(".")


def _extensions(files: Iterable[Path]) -> Counter[str]:
    return Counter(path.suffix or path.name for path in files)
