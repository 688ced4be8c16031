"""Draw the pictures of the scorecard: scenes, scenes with a word written over them, and foreign pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from clip_train.data.scenes.draw import Scene, draw_scene
from clip_train.data.scenes.foreign import Foreign, draw_foreign

_TEXT_HEIGHT = 0.17  # of the picture's side: the longest word fits the picture
_OUTLINE = 0.016  # around each letter, so that it can be read on every colour


class Written(NamedTuple):
    """A word in black letters with a white outline; its centre in fractions of the picture's side."""

    word: str
    x: float
    y: float


class SceneSketch(NamedTuple):
    """A scene, with a word over it or without one."""

    scene: Scene
    written: Written | None = None


class ForeignSketch(NamedTuple):
    """A picture that none of the scorecard's captions describes."""

    kind: Foreign
    number: int


Sketch = SceneSketch | ForeignSketch


class SketchImages:
    """Pictures that are drawn when they are read; a source for evaluations.

    Args:
        sketches: what they show.
        image_size: side in pixels.
    """

    def __init__(self, sketches: Sequence[Sketch], *, image_size: int) -> None:
        self._sketches = sketches
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._sketches)

    def read(self, index: int) -> bytes:
        """Return the picture as PNG."""
        buffer = io.BytesIO()
        draw_sketch(self._sketches[index], image_size=self._image_size).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def key(self, index: int) -> str:
        """Return a name for messages."""
        return f"picture {index} of the scorecard"


def draw_sketch(sketch: Sketch, *, image_size: int) -> Image.Image:
    """Draw a picture of [image_size, image_size] pixels, RGB. Letters look as the installed Pillow draws them."""
    if isinstance(sketch, ForeignSketch):
        return draw_foreign(sketch.kind, sketch.number, seed=0, image_size=image_size)
    picture = draw_scene(sketch.scene, image_size=image_size)
    if sketch.written is not None:
        word, x, y = sketch.written
        ImageDraw.Draw(picture).text(
            (x * image_size, y * image_size),
            word,
            fill=(0, 0, 0),
            font=ImageFont.load_default(_TEXT_HEIGHT * image_size),
            anchor="mm",
            stroke_width=max(1, round(_OUTLINE * image_size)),
            stroke_fill=(255, 255, 255),
        )
    return picture
