"""Pictures that no caption of the generated scenes describes, to test whether a model can say so."""

from __future__ import annotations

import io
import random
from enum import StrEnum
from string import ascii_lowercase

from PIL import Image, ImageDraw, ImageFont

from clip_train.data.scenes.compose import Draw, one_group
from clip_train.data.scenes.draw import draw_scene
from clip_train.data.scenes.vocabulary import BACKGROUNDS, COLOURS, UNSEEN_SHAPES, Combination

_GRAINS = (1, 2, 4, 8)  # pixels
_WORDS_PER_LINE = 4


class Foreign(StrEnum):
    """What such a picture shows."""

    blank = "blank"  # one colour
    noise = "noise"  # independent grains
    text = "text"  # a page of letters that are no words
    shapes = "shapes"  # a shape in the manner of the scenes, but none that they have


class ForeignImages:
    """Pictures of one kind, drawn when they are read; a source for evaluations.

    Args:
        kind: what they show.
        num_images: how many; picture i is a function of kind, i, seed and size only.
        seed: of all pictures.
        image_size: side in pixels.
    """

    def __init__(self, kind: Foreign, *, num_images: int, seed: int = 0, image_size: int = 64) -> None:
        self._kind = kind
        self._num_images = num_images
        self._seed = seed
        self._image_size = image_size

    def __len__(self) -> int:
        return self._num_images

    def read(self, index: int) -> bytes:
        """Return the picture as PNG."""
        buffer = io.BytesIO()
        draw_foreign(self._kind, index, seed=self._seed, image_size=self._image_size).save(buffer, "PNG")
        return buffer.getvalue()

    def key(self, index: int) -> str:
        """Return a name for messages."""
        return f"{self._kind} {index}"


def draw_foreign(kind: Foreign, index: int, *, seed: int, image_size: int) -> Image.Image:
    """Draw the picture `index` of a kind, RGB [image_size, image_size]. A pure function of its arguments."""
    draw = Draw("foreign", kind.value, seed, index)
    if kind is Foreign.blank:
        return Image.new("RGB", (image_size, image_size), _colour(draw))
    if kind is Foreign.noise:
        side = max(1, image_size // draw.pick(_GRAINS))
        content = random.Random(f"foreign/noise/{seed}/{index}").randbytes(side * side * 3)
        small = Image.frombytes("RGB", (side, side), content)
        return small.resize((image_size, image_size), Image.Resampling.NEAREST)
    if kind is Foreign.text:
        return _page(draw, image_size=image_size)
    combination = Combination(draw.pick(UNSEEN_SHAPES), draw.pick(tuple(COLOURS)))
    scene, _ = one_group(draw, combination=combination, background=draw.pick(tuple(BACKGROUNDS)), count=1)
    return draw_scene(scene, image_size=image_size)


def _colour(draw: Draw) -> tuple[int, int, int]:
    red, green, blue = (int(draw.between(0, 256)) for _ in range(3))
    return red, green, blue


def _page(draw: Draw, *, image_size: int) -> Image.Image:
    """Draw lines of random letters, dark on a light background, from edge to edge."""
    page = Image.new("RGB", (image_size, image_size), BACKGROUNDS[draw.pick(tuple(BACKGROUNDS))])
    pen = ImageDraw.Draw(page)
    size = max(6, round(image_size * draw.between(0.1, 0.22)))
    font = ImageFont.load_default(size)
    for top in range(0, image_size, round(1.2 * size)):
        lengths = [int(draw.between(2, 9)) for _ in range(_WORDS_PER_LINE)]
        words = ["".join(draw.pick(ascii_lowercase) for _ in range(length)) for length in lengths]
        pen.text((1, top), " ".join(words), fill=COLOURS["black"], font=font)
    return page
