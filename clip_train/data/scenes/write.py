"""Write generated scenes as shards: training pairs, held-out pairs, and labelled pictures of held-out classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from clip_train.data.index.jobs import run_jobs
from clip_train.data.scenes.pictures import LabelledScene, ScenePair, held_out_pair, labelled_scene, training_pair
from clip_train.data.scenes.vocabulary import COMBINATIONS, HELD_OUT, TEMPLATES
from clip_train.data.shards.benchmark import Kind, LabelledPicture, write_layout
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.errors import UserError

T = TypeVar("T")

PICTURES_PER_CLASS = 40
_FOLDERS = ("train", "val", "classes")
_CHUNK = 64  # pictures that a process draws before it hands them over


class WrittenScenes(NamedTuple):
    """What `write_scenes` wrote."""

    num_train: int
    num_val: int
    num_labelled: int

    def __str__(self) -> str:
        return (
            f"{self.num_train} training pairs, {self.num_val} held-out pairs and {self.num_labelled} labelled pictures "
            f"of {len(HELD_OUT)} held-out combinations of shape and colour (of {len(COMBINATIONS)})"
        )


def write_scenes(
    out: Path, *, num_train: int, num_val: int, seed: int, image_size: int = 64, workers: int = 1
) -> WrittenScenes:
    """Write `out/train` and `out/val` (picture and caption) and `out/classes` (clip-benchmark's layout) as shards.

    The files depend on `seed`, `image_size` and the numbers only, not on `workers`.

    Args:
        out: folder that gets them once all are drawn.
        num_train: training pairs.
        num_val: pairs of held-out combinations, no two with the same caption.
        seed: of all pictures and captions.
        image_size: side of the pictures, pixels.
        workers: processes that draw.

    Raises:
        UserError: a number is out of range, there are too few different scenes for `num_val`, or `out` has some.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_val", num_val, 1), ("image_size", image_size, 32)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    for name in _FOLDERS:
        if (out / name).is_dir() and any((out / name).iterdir()):
            raise UserError(f"{out / name} is not empty: remove it or choose another folder than {out}")
    part = out / ".part"  # what an interrupted call left there is drawn anew
    shutil.rmtree(part, ignore_errors=True)
    draw = partial(_draw_in_order, seed=seed, image_size=image_size, workers=workers)
    with ShardSetWriter(part / "train") as shards:
        for index, pair in enumerate(draw(training_pair, num_train)):
            shards.write(f"{index:08d}", {"png": pair.png, "txt": pair.caption})
    with ShardSetWriter(part / "val") as shards:
        for index, pair in enumerate(_distinct(draw(held_out_pair, 4 * num_val), num_val)):
            shards.write(f"{index:08d}", {"png": pair.png, "txt": pair.caption})
    num_labelled = PICTURES_PER_CLASS * len(HELD_OUT)
    write_classes(part / "classes", draw(labelled_scene, num_labelled))
    for name in _FOLDERS:
        (part / name).replace(out / name)
    part.rmdir()
    return WrittenScenes(num_train, num_val, num_labelled)


def _draw_in_order(draw: Callable[..., T], number: int, *, seed: int, image_size: int, workers: int) -> Iterator[T]:
    return run_jobs(partial(draw, seed=seed, image_size=image_size), range(number), jobs=workers, chunk=_CHUNK)


def _distinct(pairs: Iterator[ScenePair], number: int) -> Iterator[ScenePair]:
    """Yield the first `number` pairs with different captions: with equal ones no retrieval could be right."""
    captions: set[str] = set()
    for pair in pairs:
        if pair.caption not in captions:
            captions.add(pair.caption)
            yield pair
        if len(captions) == number:
            return
    raise UserError(f"num_val={number} is more than the different scenes that were found ({len(captions)})")


def write_classes(folder: Path, pictures: Iterator[LabelledScene]) -> None:
    """Write one shard of labelled pictures and the files that clip-benchmark's `wds` reader expects beside it."""
    write_layout(
        folder,
        (LabelledPicture("", picture.png, str(picture.label).encode()) for picture in pictures),
        kind=Kind.classification,
        classnames=[combination.class_name for combination in COMBINATIONS],
        templates=TEMPLATES,
    )
