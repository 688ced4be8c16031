"""Labelled images in one folder per class, and the layouts of ImageNet and its shifts among them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_train.data.images.folder import is_hidden
from clip_train.data.sequential import FolderImages
from clip_train.errors import UserError
from clip_train.evaluation.classify.class_names import AUTO, IMAGENET, names_from, prompts_from
from clip_train.evaluation.classify.imagenet_files import objectnet_classes, open_flat_imagenet
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.prompts.files import imagenet_classnames, imagenet_parts, imagenet_wnids

_WNID = re.compile(r"n\d{8}")
_FEW_MISSING = 100  # of ImageNet's classes: an incomplete copy, where more are a choice of classes


class _Classes(NamedTuple):
    """The class names in order, the class of each folder, and what is odd about them."""

    names: list[str]
    label_of: dict[str, int]
    warnings: list[str]


def open_folders(base: Path, *, root: Path, classnames: str, templates: str) -> LabelledImages:
    """Open the class folders of `base`; ImageNet's validation pictures may also lie there flat, beside their labels.

    Args:
        base: folder of the class folders.
        root: the set's folder, where names, templates and labels may lie.
        classnames: as in `ClassifyConfig`.
        templates: as in `ClassifyConfig`.

    Raises:
        UserError: the folders are not the classes of a set, or not those that `classnames` says.
    """
    objectnet = objectnet_classes(root) if classnames == AUTO else None
    if objectnet is not None and (root / "images").is_dir():
        base = root / "images"
    folders = sorted(path.name for path in base.iterdir() if path.is_dir() and not is_hidden(path.name))
    if not folders or any(base.glob("ILSVRC2012_val_*")):
        return open_flat_imagenet(base, root=root, templates=templates)
    if objectnet is not None:
        classes = _Classes(list(objectnet.values()), {name: i for i, name in enumerate(objectnet)}, [])
    else:
        classes = _classes_of(folders, classnames=classnames, root=root)
    is_imagenet = classnames == IMAGENET or objectnet is not None or all(_WNID.fullmatch(name) for name in folders)
    source = FolderImages(base)
    labels, kept = [], []
    for i in range(len(source)):
        name, slash, _ = source.key(i).partition("/")
        if not slash:
            raise UserError(f"{base / name} lies outside the class folders beside it")
        if name in classes.label_of:
            kept.append(i)
            labels.append(classes.label_of[name])
    return LabelledImages(
        source=source if len(kept) == len(source) else source.only(kept),
        labels=np.array(labels, dtype=np.int64),
        classnames=classes.names,
        templates=prompts_from(
            templates, root=root, classnames=classes.names, otherwise=IMAGENET if is_imagenet else "single"
        ),
        warnings=classes.warnings,
    )


def _classes_of(folders: list[str], *, classnames: str, root: Path) -> _Classes:
    """Return the classes that folder names stand for.

    Folders named by integers are classes of that number (text order would put 10 before 2: ImageNet-V2); folders named
    by WordNet id are ImageNet's classes in sorted order, and a part of them is scored among that part (ImageNet-A, -R).
    """
    if all(name.isdecimal() for name in folders):
        return _numbered(folders, classnames=classnames, root=root)
    label_of = {name: i for i, name in enumerate(folders)}
    names_of_wnids = dict(zip(imagenet_wnids(), imagenet_classnames(), strict=True))
    strange = [name for name in folders if name not in names_of_wnids]
    if classnames in (AUTO, IMAGENET) and not strange:
        return _Classes([names_of_wnids[name] for name in folders], label_of, _missing_wnids(folders, root=root))
    if classnames == IMAGENET:
        raise UserError(
            f"{root} has the class folder {strange[0]!r}, which is no ImageNet id: a probable permutation of the "
            "classes. With classnames=imagenet the folders must be ids such as n01440764, or 0 … 999; other names sort "
            "into another order, and the accuracy would be near 0.1 %"
        )
    names = names_from(classnames, root=root)
    if names is None:
        return _Classes([name.replace("_", " ") for name in folders], label_of, [])
    if len(names) != len(folders):
        raise UserError(f"{root} has {len(folders)} class folders, but there are {len(names)} class names")
    return _Classes(names, label_of, [])


def _numbered(folders: list[str], *, classnames: str, root: Path) -> _Classes:
    label_of = {name: int(name) for name in folders}
    if len(set(label_of.values())) < len(folders):
        raise UserError(f"{root}: two class folders stand for the same number")
    names = names_from(classnames, root=root)
    if names is None:
        raise UserError(f"{root} names its class folders by number: say what they are with classnames=FILE or imagenet")
    if max(label_of.values()) >= len(names):
        raise UserError(f"{root} has class folder {max(label_of.values())}, but there are {len(names)} class names")
    return _Classes(names, label_of, [])


def _missing_wnids(folders: list[str], *, root: Path) -> list[str]:
    """Return a warning if only some of ImageNet's classes are there and no published set has just these.

    Raises:
        UserError: a few are missing, so that somebody's copy is incomplete.
    """
    whole = {"ImageNet": imagenet_wnids(), **imagenet_parts()}
    present = set(folders)
    if any(present == set(wnids) for wnids in whole.values()):
        return []
    name, wnids = min(whole.items(), key=lambda item: len(present ^ set(item[1])))
    missing = sorted(set(wnids) - present)
    if present < set(wnids) and len(missing) <= _FEW_MISSING * len(wnids) // 1000:
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(wnids)} class folders of {name} ({', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''}): the copy is incomplete, and its score would be of another task"
        )
    return [f"scored among the {len(present)} of ImageNet's 1,000 classes that have a folder, not among all of them"]
