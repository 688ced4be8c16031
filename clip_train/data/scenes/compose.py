"""Compose random scenes and say in words what they show."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, TypeVar

from clip_train.data.scenes.draw import Item, Scene
from clip_train.data.scenes.vocabulary import BACKGROUNDS, HELD_OUT, SEEN, TEXTURES, Combination

T = TypeVar("T")

_PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
_RELATIONS = ("left of", "above", "beside")
_RADII = {"small": (0.135, 0.15), "large": (0.2, 0.225)}  # fractions of the picture's side
_SHARE_OF_TWO_SHAPES = 0.2
_SHARE_OF_SOLID = 0.4  # the rest goes to all textures alike
_DETAIL = 0.2  # chance that a varied caption tells size, place or texture; with more of them the words for shapes are
# learned later, because the other words tell most captions of a batch apart
_SHARE_OF_PARTIAL = 0.2  # of the noun phrases: `a circle` or `a red shape`. Words learned apart combine better.
_NUMBERS = ("zero", "one", "two", "three", "four")
_PREFIXES = ("a picture of ", "a drawing of ", "an image of ", "this shows ", "we see ")
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_TEXTURE_WORDS = {
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "outlined": ("outlined",),
    "solid": ("solid",),
}


class Detail(StrEnum):
    """How much a caption tells."""

    varied = "varied"  # any part but colour and shape may be left out, the wording changes
    full = "full"  # everything in fixed words: two captions are equal only where the pictures show the same


class Group(NamedTuple):
    """Equal shapes that one noun phrase names."""

    combination: Combination
    texture: str
    size: str
    number: int


class Description(NamedTuple):
    """What a caption can say about a scene."""

    groups: tuple[Group, ...]
    place: str  # a key of _PLACES for a single shape, a member of _RELATIONS for two, "" otherwise
    background: str


class Draw:
    """Random choices that are the same on every machine and version: only `random()` is promised to be stable."""

    def __init__(self, *name: object) -> None:
        self._uniform = random.Random("/".join(map(str, name))).random

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._uniform() * len(choices))]

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._uniform()

    def shuffled(self, choices: Sequence[T]) -> list[T]:
        keyed = [(self._uniform(), index) for index in range(len(choices))]
        return [choices[index] for _, index in sorted(keyed)]


def compose(draw: Draw, *, first: Combination | None = None) -> tuple[Scene, Description]:
    """Compose a scene of one group of one to four equal shapes, or of two shapes.

    Without `first` no held-out combination appears. With it, the scene shows that combination and, where it has a
    second shape, a combination that training shows too.
    """
    background = draw.pick(tuple(BACKGROUNDS))
    if draw.chance(_SHARE_OF_TWO_SHAPES):
        return _two_shapes(draw, first=first or draw.pick(SEEN), background=background)
    count = draw.pick((1, 1, 1, 1, 1, 2, 3, 4))
    return one_group(draw, combination=first or draw.pick(SEEN), background=background, count=count)


def one_group(draw: Draw, *, combination: Combination, background: str, count: int) -> tuple[Scene, Description]:
    """Compose a scene of one to four equal shapes."""
    group = Group(combination, _texture(draw), draw.pick(tuple(_RADII)), count)
    radius = _radius(draw, group)
    if count == 1:
        place = draw.pick(tuple(_PLACES))
        points = [_PLACES[place]]
    else:
        place = ""
        cells = (0.25, 0.75) if group.size == "large" else (0.17, 0.5, 0.83)
        points = draw.shuffled([(x, y) for x in cells for y in cells])[:count]
    items = tuple(_item(draw, group, radius=radius, point=point, jitter=0.015) for point in points)
    return Scene(items, background), Description((group,), place, background)


def _two_shapes(draw: Draw, *, first: Combination, background: str) -> tuple[Scene, Description]:
    others = [other for other in SEEN if other != first]
    groups = [Group(c, _texture(draw), draw.pick(tuple(_RADII)), 1) for c in (first, draw.pick(others))]
    groups = draw.shuffled(groups)  # either one may be named first
    relation = draw.pick(_RELATIONS)
    across = draw.between(0.35, 0.65)
    points = {
        "left of": ((0.25, across), (0.75, across)),
        "above": ((across, 0.25), (across, 0.75)),
        "beside": draw.pick((((0.25, 0.25), (0.75, 0.75)), ((0.75, 0.25), (0.25, 0.75)))),
    }[relation]
    items = tuple(
        _item(draw, group, radius=_radius(draw, group), point=point, jitter=0.015)
        for group, point in zip(groups, points, strict=True)
    )
    return Scene(items, background), Description(tuple(groups), relation, background)


def _texture(draw: Draw) -> str:
    return "solid" if draw.chance(_SHARE_OF_SOLID) else draw.pick(TEXTURES)


def _radius(draw: Draw, group: Group) -> float:
    return draw.between(*_RADII[group.size])


def _item(draw: Draw, group: Group, *, radius: float, point: tuple[float, float], jitter: float) -> Item:
    x, y = (coordinate + draw.between(-jitter, jitter) for coordinate in point)
    shape, colour = group.combination
    return Item(shape, colour, group.texture, x, y, radius, rotation=draw.between(-1, 1) * math.radians(8))


def describe(description: Description, draw: Draw, *, detail: Detail) -> str:
    """Write a caption, e.g. `a small red circle in the top left corner`."""
    phrases = [_noun_phrase(group, draw, detail=detail) for group in description.groups]
    full = detail is Detail.full
    if len(phrases) == 2:
        caption = _relate(phrases, description.place, draw, full=full)
    elif description.place and (full or draw.chance(_DETAIL)):
        caption = f"{phrases[0]} {_place_phrase(description.place, draw, full=full)}"
    else:
        caption = phrases[0]
    if full or draw.chance(0.3 * _DETAIL):
        caption = f"{caption} on a {description.background} background"
    if not full and draw.chance(0.4):
        caption = draw.pick(_PREFIXES) + caption
    return caption


def _noun_phrase(group: Group, draw: Draw, *, detail: Detail) -> str:
    shape, colour = group.combination
    words: list[str] = []
    if detail is Detail.full:
        words = [group.size, group.texture]
    else:
        if draw.chance(_DETAIL):
            words.append(draw.pick(_SIZE_WORDS[group.size]))
        if draw.chance((0.4 if group.texture == "solid" else 1.2) * _DETAIL):
            words.append(draw.pick(_TEXTURE_WORDS[group.texture]))
        if draw.chance(_SHARE_OF_PARTIAL):
            colour, shape = draw.pick((("", shape), (colour, "shape")))
    words += [colour, shape] if colour else [shape]
    if group.number > 1:
        return " ".join([_NUMBERS[group.number], *words]) + ("es" if shape == "cross" else "s")
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _place_phrase(place: str, draw: Draw, *, full: bool) -> str:
    if place == "centre":
        phrases = ("in the centre", "in the middle")
    elif " " in place:
        phrases = (f"in the {place} corner", f"at the {place}")
    elif place in ("left", "right"):
        phrases = (f"on the {place}", f"on the {place} side")
    else:
        phrases = (f"at the {place}", f"near the {place}")
    return phrases[0] if full else draw.pick(phrases)


def _relate(phrases: list[str], relation: str, draw: Draw, *, full: bool) -> str:
    one, other = phrases
    if relation == "beside" or not (full or draw.chance(0.6)):
        joint = "and" if full else draw.pick(("and", "and", "with", "beside"))
        return f"{one} {joint} {other}"
    if full or draw.chance(0.5):
        return f"{one} {'to the left of' if relation == 'left of' else 'above'} {other}"
    return f"{other} {'to the right of' if relation == 'left of' else 'below'} {one}"


def held_out_combination(index: int) -> Combination:
    """Return the held-out combinations in turn, so that every run of 20 indices shows each once."""
    return HELD_OUT[index % len(HELD_OUT)]
