"""Files that come with ImageNet and ObjectNet and say what their pictures show."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.sequential import FolderImages
from clip_train.errors import UserError
from clip_train.evaluation.classify.class_names import IMAGENET, prompts_from
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.prompts.files import imagenet_classnames, imagenet_wnids, read_lines

_NUMBER = re.compile(r"_val_0*(\d+)$")
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_SOLUTION = "LOC_val_solution.csv"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def open_flat_imagenet(base: Path, *, root: Path, templates: str) -> LabelledImages:
    """Open ImageNet's validation pictures as they are published: in one folder, with the labels in a file.

    The file lies in `root`, in `base` or below a folder there: the devkit's ground truth with its `meta.mat`,
    `LOC_val_solution.csv`, or a list of ids in the order of the pictures' numbers.

    Raises:
        UserError: these are no such pictures, or nothing says their labels.
    """
    source = FolderImages(base)
    numbers = [_NUMBER.search(Path(source.key(i)).stem) for i in range(len(source))]
    if not all(numbers):
        raise UserError(
            f"{base} holds neither one folder per class, nor shards, nor ImageNet's validation pictures "
            f"(ILSVRC2012_val_00000001.JPEG …); it has {source.key(0)}"
        )
    wnid_of = _labels_by_number(root)
    class_of = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    labels = []
    for i, number in enumerate(numbers):
        assert number is not None
        wnid = wnid_of.get(int(number[1]))
        if wnid not in class_of:
            raise UserError(f"{source.key(i)}: the files beside it say {wnid or 'no label'}, which is no ImageNet id")
        labels.append(class_of[wnid])
    names = imagenet_classnames()
    return LabelledImages(
        source=source,
        labels=np.array(labels, dtype=np.int64),
        classnames=names,
        templates=prompts_from(templates, root=root, classnames=names, otherwise=IMAGENET),
    )


def objectnet_classes(root: Path) -> dict[str, str] | None:
    """Return folder -> class name of the 113 classes that ObjectNet shares with ImageNet, in order of the folders.

    None if `root` has none of ObjectNet's `mappings/`.

    Raises:
        UserError: these files cannot be read.
    """
    place = next((p for p in (root / "mappings", root) if (p / "objectnet_to_imagenet_1k.json").is_file()), None)
    if place is None:
        return None
    label_of: dict[str, str] = _read_object(place / "folder_to_objectnet_label.json")
    shared = set(_read_object(place / "objectnet_to_imagenet_1k.json"))
    return {folder: label.lower() for folder, label in sorted(label_of.items()) if label in shared}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object")
    return content


def _labels_by_number(root: Path) -> dict[int, str]:
    """Return the id of each validation picture by its number, which starts at 1."""
    if path := _find(root, _SYNSETS):
        return dict(enumerate(read_lines(path, counted=True), start=1))
    if path := _find(root, _SOLUTION):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(_NUMBER.search(row["ImageId"]), row["PredictionString"].split()) for row in csv.DictReader(file)]
        return {int(number[1]): boxes[0] for number, boxes in rows if number and boxes}
    if path := _find(root, _GROUND_TRUTH):
        wnid_of = _devkit_ids(path.parent / "meta.mat")
        return {i: wnid_of[int(line)] for i, line in enumerate(read_lines(path, counted=True), start=1)}
    raise UserError(
        f"{root} holds ImageNet's validation pictures in one folder, and no labels: put {_GROUND_TRUTH} and meta.mat "
        f"of the devkit, {_SOLUTION} or {_SYNSETS} beside them, or sort the pictures into folders named by id"
    )


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, *sorted(root.glob(f"*/{name}")), *sorted(root.glob(f"*/*/{name}")))
                 if path.is_file()), None)  # fmt: skip


def _devkit_ids(path: Path) -> dict[int, str]:
    """Return the devkit's own class numbers -> id: they are not in the order of the ids."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"reading {path} needs scipy: pip install scipy, or use {_SOLUTION} or {_SYNSETS}") from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the devkit's meta.mat: {error}") from error
    return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if int(synset["num_children"]) == 0}
