"""Small generated sets in the layouts that clip-benchmark reads: one of each kind, and a fake ImageNet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clip_train.data.scenes.compose import Draw, one_group
from clip_train.data.scenes.draw import draw_scene
from clip_train.data.scenes.vocabulary import BACKGROUNDS, TEMPLATES, Combination
from clip_train.data.shards.benchmark import Kind, LabelledPicture, multi_hot, write_layout
from clip_train.evaluation.prompts.files import imagenet_wnids

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square")
CLASSES = tuple(Combination(shape, colour) for shape in SHAPES for colour in COLOURS)
PROPERTIES = (*COLOURS, *SHAPES)
NUM_PICTURES = 40
PER_SHARD = 20
IMAGENET_PICTURES = 2  # of each class
_SIZE = 64
_IMAGENET_SIZE = 32


def write_sets(folder: Path) -> dict[str, Path]:
    """Write 40 pictures of three colours and two shapes, and return kind -> folder of the set.

    `shapes` has one of six classes per picture, `colours` one of three, which are too few for acc5, `captions` two
    captions per picture, all different, `labels` a colour and a shape per picture.
    """
    sets = {name: folder / name for name in ("shapes", "colours", "captions", "labels")}
    for name, classnames in (("shapes", [c.class_name for c in CLASSES]), ("colours", list(COLOURS))):
        write_layout(
            sets[name],
            (
                LabelledPicture(f"{i}", picture, str(c % len(classnames)).encode())
                for i, (picture, c) in enumerate(_pictures())
            ),
            kind=Kind.classification,
            classnames=classnames,
            templates=TEMPLATES,
            samples_per_shard=PER_SHARD,
        )
    write_layout(
        sets["captions"],
        (
            LabelledPicture(f"{i}", picture, "\n".join(_captions(CLASSES[c], number=i)).encode())
            for i, (picture, c) in enumerate(_pictures())
        ),
        kind=Kind.retrieval,
        samples_per_shard=PER_SHARD,
    )
    write_layout(
        sets["labels"],
        (
            LabelledPicture(f"{i}", picture, multi_hot(_properties(CLASSES[c]), num_classes=len(PROPERTIES)))
            for i, (picture, c) in enumerate(_pictures())
        ),
        kind=Kind.multilabel,
        classnames=PROPERTIES,
        templates=TEMPLATES,
        samples_per_shard=PER_SHARD,
    )
    return sets


def write_fake_imagenet(folder: Path) -> None:
    """Write `folder/val/<id>/*.JPEG`, pictures of noise for each of the 1,000 classes."""
    rng = np.random.default_rng(0)
    for wnid in imagenet_wnids():
        place = folder / "val" / wnid
        place.mkdir(parents=True)
        for i in range(IMAGENET_PICTURES):
            # A few large blocks: noise in every pixel would look the same to the model everywhere.
            blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            blocks.resize((_IMAGENET_SIZE, _IMAGENET_SIZE), Image.Resampling.BICUBIC).save(place / f"{wnid}_{i}.JPEG")


def _pictures() -> Iterator[tuple[bytes, int]]:
    """Yield pictures as PNG with the number of their class; a few of them are of odd shape."""
    for i in range(NUM_PICTURES):
        draw = Draw("reference", i)
        c = i % len(CLASSES)
        scene, _ = one_group(draw, combination=CLASSES[c], background=draw.pick(tuple(BACKGROUNDS)), count=1)
        image = draw_scene(scene, image_size=_SIZE)
        if i % 7 == 0:
            image = image.crop((0, 8, _SIZE, _SIZE - 9))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield buffer.getvalue(), c


def _captions(combination: Combination, *, number: int) -> list[str]:
    return [f"a {combination.class_name}, number {number}", f"picture {number} shows a {combination.class_name}"]


def _properties(combination: Combination) -> list[int]:
    return [PROPERTIES.index(combination.colour), PROPERTIES.index(combination.shape)]
