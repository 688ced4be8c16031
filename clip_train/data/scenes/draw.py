"""Draw a scene: anti-aliased shapes with a texture on a plain background."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from clip_train.data.scenes.vocabulary import BACKGROUNDS, COLOURS

_SUPERSAMPLING = 4
_REACH = 1.26  # the farthest corner of a shape from its centre, in radii
_PALE = 0.66  # how far the second colour of a textured shape lies towards white

Point = tuple[float, float]


class Item(NamedTuple):
    """One shape of a scene. Lengths are fractions of the picture's side, y grows downwards."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0  # radians


class Scene(NamedTuple):
    """Everything that is visible in one picture."""

    items: tuple[Item, ...]
    background: str


def draw_scene(scene: Scene, *, image_size: int) -> Image.Image:
    """Draw `scene` as an RGB picture of [image_size, image_size] pixels."""
    picture = Image.new("RGB", (image_size, image_size), BACKGROUNDS[scene.background])
    for item in scene.items:
        radius = item.radius * image_size
        side = math.ceil(2 * _REACH * radius) + 2
        left, top = round(item.x * image_size - side / 2), round(item.y * image_size - side / 2)
        colour = COLOURS[item.colour]
        silhouette, inked = _masks(item, radius=radius, side=side)
        if item.texture != "solid":
            pale = (*(round(channel + _PALE * (255 - channel)) for channel in colour),)
            picture.paste(pale, (left, top), silhouette)
        picture.paste(colour, (left, top), inked)
    return picture


def _masks(item: Item, *, radius: float, side: int) -> tuple[Image.Image, Image.Image]:
    """Return the whole shape and the part of it in full colour, both [side, side] coverage masks."""
    scale = _SUPERSAMPLING
    centre = side * scale / 2
    cos, sin = math.cos(item.rotation) * radius * scale, math.sin(item.rotation) * radius * scale
    loops = [[(centre + x * cos - y * sin, centre + x * sin + y * cos) for x, y in loop] for loop in _loops(item.shape)]
    large = Image.new("L", (side * scale, side * scale), 0)
    pen = ImageDraw.Draw(large)
    for index, loop in enumerate(loops):
        pen.polygon(loop, fill=0 if index else 255)  # loops after the first are holes
    silhouette = large.reduce(scale)
    if item.texture == "solid":
        return silhouette, silhouette
    if item.texture == "outlined":
        line = Image.new("L", large.size, 0)
        pen = ImageDraw.Draw(line)
        width = max(round(0.34 * radius * scale), scale)  # half of it falls outside the shape and is cut off
        for loop in loops:
            pen.line([*loop, loop[0], loop[1]], fill=255, width=width, joint="curve")
        return silhouette, ImageChops.multiply(large, line).reduce(scale)
    pattern = _pattern(item.texture, side=side * scale, period=max(0.56 * radius, 3.6) * scale)
    return silhouette, ImageChops.multiply(large, pattern).reduce(scale)


@lru_cache(maxsize=256)
def _pattern(texture: str, *, side: int, period: float) -> Image.Image:
    """Draw horizontal stripes or a grid of pale dots, 255 where the full colour shows."""
    pattern = Image.new("L", (side, side), 0 if texture == "striped" else 255)
    pen = ImageDraw.Draw(pattern)
    steps = math.ceil(side / period) + 1
    for row in range(-steps, steps + 1):
        y = side / 2 + row * period
        if texture == "striped":
            pen.rectangle((0, y - 0.3 * period, side, y + 0.3 * period), fill=255)
            continue
        for column in range(-steps, steps + 1):
            x = side / 2 + (column + 0.5 * (row % 2)) * period
            pen.ellipse((x - 0.27 * period, y - 0.27 * period, x + 0.27 * period, y + 0.27 * period), fill=0)
    return pattern


@lru_cache(maxsize=32)
def _loops(shape: str) -> tuple[tuple[Point, ...], ...]:
    """Return the outline of a shape of radius 1 around the origin, then its holes."""
    match shape:
        case "circle":
            return (_regular(48),)
        case "ring":
            return (_regular(48), _regular(40, radius=0.48))
        case "crescent":
            return (_crescent(),)
        case "square":
            return (((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),)
        case "diamond":
            return (((0, -1), (0.66, 0), (0, 1), (-0.66, 0)),)
        case "triangle":
            return (((0, -0.95), (0.98, 0.78), (-0.98, 0.78)),)
        case "star":
            return (_star(points=5, inner=0.42),)
        case "heart":
            return (_heart(),)
        case "cross":
            a, b = 0.95, 0.32
            return (
                (
                    (-b, -a),
                    (b, -a),
                    (b, -b),
                    (a, -b),
                    (a, b),
                    (b, b),
                    (b, a),
                    (-b, a),
                    (-b, b),
                    (-a, b),
                    (-a, -b),
                    (-b, -b),
                ),
            )
        case "arrow":
            return (((-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)),)
    return _unseen_loops(shape)


def _unseen_loops(shape: str) -> tuple[tuple[Point, ...], ...]:
    match shape:
        case "pentagon":
            return (_star(points=5, inner=math.cos(math.pi / 5)),)
        case "trapezoid":
            return (((-0.5, -0.65), (0.5, -0.65), (1, 0.65), (-1, 0.65)),)
        case "lightning":
            return (((0.2, -1), (-0.7, 0.2), (-0.1, 0.2), (-0.3, 1), (0.7, -0.25), (0.1, -0.25), (0.6, -1)),)
        case "house":
            return (((0, -1), (0.85, -0.2), (0.85, 0.85), (-0.85, 0.85), (-0.85, -0.2)),)
        case "gear":
            return (_star(points=12, inner=0.72), _regular(32, radius=0.3))
        case "hourglass":
            return (((-0.8, -0.95), (0.8, -0.95), (0.1, 0), (0.8, 0.95), (-0.8, 0.95), (-0.1, 0)),)
    raise ValueError(f"unknown shape {shape!r}")


def _regular(corners: int, *, radius: float = 1.0) -> tuple[Point, ...]:
    angles = (2 * math.pi * k / corners for k in range(corners))
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _star(*, points: int, inner: float) -> tuple[Point, ...]:
    corners = ((1.0 if k % 2 == 0 else inner, math.pi * k / points - math.pi / 2) for k in range(2 * points))
    return tuple((radius * math.cos(a), radius * math.sin(a)) for radius, a in corners)


def _heart() -> tuple[Point, ...]:
    angles = (2 * math.pi * k / 40 for k in range(40))
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5 - 0.08,
        )
        for t in angles
    )


def _crescent() -> tuple[Point, ...]:
    # The far side of the unit circle, closed by an arc of a circle that bites into it from the right.
    tips = 1.05  # angle of the two tips from the positive x axis, radians
    outer = [tips + (2 * math.pi - 2 * tips) * k / 32 for k in range(33)]
    centre, radius = 0.62, math.hypot(math.cos(tips) - 0.62, math.sin(tips))
    start = math.atan2(-math.sin(tips), math.cos(tips) - centre) % (2 * math.pi)
    end = 2 * math.pi - start
    inner = [start + (end - start) * k / 24 for k in range(1, 24)]
    return tuple((math.cos(a), math.sin(a)) for a in outer) + tuple(
        (centre + radius * math.cos(a), radius * math.sin(a)) for a in inner
    )
