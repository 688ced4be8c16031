"""Open a labelled set of images: clip-benchmark's layout of shards, or one folder per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.prompts.files import imagenet_classnames, imagenet_wnids, load_templates, read_lines

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource

_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """Images with one class each, and how the classes are put into words."""

    source: ImageSource
    labels: np.ndarray
    """[N] int64 in [0, C)."""
    classnames: Sequence[str]
    """C names in class order. They may repeat: never key by them."""
    templates: Sequence[str]


def open_labelled_images(root: str, *, split: str, classnames: str, templates: str) -> LabelledImages:
    """Open the images of `root`; the arguments are the fields of `ClassifyConfig`.

    Raises:
        UserError: the folder, names or templates do not fit together.
        IntegrityError: a label is missing or out of range.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"root={root} is not a folder")
    if (folder / split / "nshards.txt").is_file():
        return _open_shards(folder, split=split, classnames=classnames, templates=templates)
    return _open_folders(folder, split=split, classnames=classnames, templates=templates)


def _open_shards(root: Path, *, split: str, classnames: str, templates: str) -> LabelledImages:
    from clip_train.data.sequential import ShardImages

    names = read_lines(root / "classnames.txt") if classnames == "auto" else _named_classes(classnames)
    prompts = root / "zeroshot_classification_templates.txt"
    if templates == "auto":
        templates = str(prompts) if prompts.is_file() else "single"
    text = (root / split / "nshards.txt").read_text(encoding="utf-8").strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{root / split / 'nshards.txt'} must hold the number of shards, not {text!r}")
    source = ShardImages([root / split / f"{i}.tar" for i in range(int(text))])
    labels = [
        _parse_label(source.text(i, "cls"), key=source.key(i), num_classes=len(names)) for i in range(len(source))
    ]
    return LabelledImages(
        source=source, labels=np.array(labels, dtype=np.int64), classnames=names, templates=load_templates(templates)
    )


def _parse_label(text: str, *, key: str, num_classes: int) -> int:
    text = text.strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise IntegrityError(f"{key}: its .cls is {text!r}, not an integer in [0, {num_classes})")
    return int(text)


def _open_folders(root: Path, *, split: str, classnames: str, templates: str) -> LabelledImages:
    from clip_train.data.sequential import FolderImages

    base = root / split if (root / split).is_dir() else root
    folders = sorted(path.name for path in base.iterdir() if path.is_dir())
    if not folders:
        raise UserError(f"{base} holds neither {split}/nshards.txt nor one folder per class")
    names, label_of = _classes_of_folders(folders, classnames=classnames, root=root)
    if templates == "auto":
        prompts = root / "zeroshot_classification_templates.txt"
        is_imagenet = classnames == "imagenet" or all(_WNID.fullmatch(name) for name in folders)
        templates = str(prompts) if prompts.is_file() else ("imagenet" if is_imagenet else "single")
    source = FolderImages(base)
    labels = []
    for i in range(len(source)):
        name, slash, _ = source.key(i).partition("/")
        if not slash:
            raise UserError(f"{base / name} lies outside the class folders beside it")
        labels.append(label_of[name])
    return LabelledImages(
        source=source, labels=np.array(labels, dtype=np.int64), classnames=names, templates=load_templates(templates)
    )


def _classes_of_folders(folders: list[str], *, classnames: str, root: Path) -> tuple[list[str], dict[str, int]]:
    """Return the class names in order, and each folder's class.

    Folders named by integers are classes of that number (text order would put 10 before 2: ImageNet-V2); folders named
    by WordNet id are ImageNet's classes in sorted order, and a part of them is scored among that part (ImageNet-A, -R).
    """
    if all(name.isdecimal() for name in folders):
        label_of = {name: int(name) for name in folders}
        if len(set(label_of.values())) < len(folders):
            raise UserError(f"{root}: two class folders stand for the same number")
        names = _names_from(classnames, root=root)
        if names is None:
            raise UserError(
                f"{root} names its class folders by number: say what they are with classnames=FILE or imagenet"
            )
        if max(label_of.values()) >= len(names):
            raise UserError(f"{root} has class folder {max(label_of.values())}, but there are {len(names)} class names")
        return names, label_of
    label_of = {name: i for i, name in enumerate(folders)}
    names_of_wnids = dict(zip(imagenet_wnids(), imagenet_classnames(), strict=True))
    if classnames in ("auto", "imagenet") and all(name in names_of_wnids for name in folders):
        return [names_of_wnids[name] for name in folders], label_of
    if classnames == "imagenet":
        strange = next(name for name in folders if name not in names_of_wnids)
        raise UserError(
            f"{root} has the class folder {strange!r}, which is no ImageNet id: with classnames=imagenet the folders "
            "must be ids such as n01440764, or 0 … 999; another order would silently permute the classes"
        )
    names = _names_from(classnames, root=root)
    if names is None:
        return [name.replace("_", " ") for name in folders], label_of
    if len(names) != len(folders):
        raise UserError(f"{root} has {len(folders)} class folders, but there are {len(names)} class names")
    return names, label_of


def _names_from(classnames: str, *, root: Path) -> list[str] | None:
    if classnames != "auto":
        return _named_classes(classnames)
    return read_lines(root / "classnames.txt") if (root / "classnames.txt").is_file() else None


def _named_classes(classnames: str) -> list[str]:
    if classnames == "imagenet":
        return imagenet_classnames()
    if not Path(classnames).is_file():
        raise UserError(f"classnames={classnames} is neither auto, imagenet nor a file")
    return read_lines(classnames)
