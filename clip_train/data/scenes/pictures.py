"""The pictures of the generated data sets, each a pure function of its index and the seed."""

from __future__ import annotations

import io
from typing import NamedTuple

from clip_train.data.scenes.compose import Detail, Draw, compose, describe, held_out_combination, one_group
from clip_train.data.scenes.draw import Scene, draw_scene
from clip_train.data.scenes.vocabulary import BACKGROUNDS, COMBINATIONS


class ScenePair(NamedTuple):
    """A picture as PNG and its caption."""

    png: bytes
    caption: str


class LabelledScene(NamedTuple):
    """A picture as PNG and the index of its class in `COMBINATIONS`."""

    png: bytes
    label: int


def training_pair(index: int, *, seed: int, image_size: int) -> ScenePair:
    """Draw the training pair `index`: no held-out combination, captions that vary. A pure function of its arguments."""
    draw = Draw("scenes", seed, "train", index)
    scene, description = compose(draw)
    caption = describe(description, draw, detail=Detail.varied)
    return ScenePair(_png(scene, image_size=image_size), caption)


def held_out_pair(index: int, *, seed: int, image_size: int) -> ScenePair:
    """Draw the validation pair `index`: a held-out combination, alone or beside another, told in full."""
    draw = Draw("scenes", seed, "val", index)
    scene, description = compose(draw, first=held_out_combination(index))
    caption = describe(description, draw, detail=Detail.full)
    return ScenePair(_png(scene, image_size=image_size), caption)


def labelled_scene(index: int, *, seed: int, image_size: int) -> LabelledScene:
    """Draw the classification picture `index`: one shape, of a held-out combination."""
    draw = Draw("scenes", seed, "classes", index)
    combination = held_out_combination(index)
    scene, _ = one_group(draw, combination=combination, background=draw.pick(tuple(BACKGROUNDS)), count=1)
    return LabelledScene(_png(scene, image_size=image_size), COMBINATIONS.index(combination))


def _png(scene: Scene, *, image_size: int) -> bytes:
    buffer = io.BytesIO()
    draw_scene(scene, image_size=image_size).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
