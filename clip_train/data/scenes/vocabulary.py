"""The words of the generated scenes, and the combinations that training never sees."""

from __future__ import annotations

from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "diamond", "arrow")
UNSEEN_SHAPES = ("pentagon", "trapezoid", "lightning", "house", "gear", "hourglass")
"""Shapes that no caption names and no training picture shows."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (250, 138, 16),
    "yellow": (246, 214, 24),
    "green": (34, 145, 52),
    "cyan": (40, 200, 214),
    "blue": (32, 72, 208),
    "purple": (120, 40, 160),
    "pink": (250, 130, 190),
    "brown": (122, 72, 30),
    "black": (24, 24, 26),
}

TEXTURES = ("solid", "striped", "dotted", "outlined")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "light grey": (216, 216, 216),
    "grey": (176, 176, 176),
}

TEMPLATES = ("a {}", "a picture of a {}", "a large {}", "a small {}")
"""Prompt templates of the zero-shot classes, in the words of the training captions."""


class Combination(NamedTuple):
    """A shape in a colour: one class of the zero-shot evaluation."""

    shape: str
    colour: str

    @property
    def class_name(self) -> str:
        return f"{self.colour} {self.shape}"


COMBINATIONS = tuple(Combination(shape, colour) for shape in SHAPES for colour in COLOURS)


def _held_out() -> tuple[Combination, ...]:
    # 3 has no factor in common with 10, so every shape and every colour is held out exactly twice.
    colours = tuple(COLOURS)
    return tuple(
        Combination(shape, colours[(3 * row + shift) % len(colours)])
        for row, shape in enumerate(SHAPES)
        for shift in (1, 5)
    )


HELD_OUT = _held_out()
SEEN = tuple(combination for combination in COMBINATIONS if combination not in set(HELD_OUT))
