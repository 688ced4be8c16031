"""Compose the cards: which pictures, which captions, which answers.

Items come in blocks. Within a block all items have the same captions, and each caption is right equally often, so that
whoever looks at the captions alone, or at their order or length, is right exactly as often as guessing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product

from clip_train.data.scenes.compose import Draw
from clip_train.data.scenes.draw import Item, Scene
from clip_train.data.scenes.foreign import Foreign
from clip_train.data.scenes.vocabulary import BACKGROUNDS, Combination
from clip_train.evaluation.choose.choices import Choice, Kind
from clip_train.evaluation.scorecard.pictures import ForeignSketch, SceneSketch, Sketch, Written

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
COMBINATIONS = tuple(Combination(shape, colour) for shape in SHAPES for colour in COLOURS)
NUMBERS = ("one", "two", "three", "four", "five", "six")

_RADII = (0.14, 0.22)  # of single shapes, fractions of the picture's side
_PLACES = (0.25, 0.5, 0.75)  # of single shapes: where a model that was trained on generated scenes has seen them
_JITTER = 0.015
_TOTAL = (0.2, 0.24)  # radius of one shape that has the area of all counted ones together
_APART = 2.4  # least distance of counted shapes, in radii: their corners do not touch
_WRITTEN_ON_RADIUS = 0.225
# Where the first of two shapes lies, and the words between it and the second in a true caption.
_RELATIONS = {
    "left": ((0.25, None), "to the left of"),
    "right": ((0.75, None), "to the right of"),
    "above": ((None, 0.25), "above"),
    "below": ((None, 0.75), "below"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A picture of one shape."""

    picture: int
    label: int
    """Place in `COMBINATIONS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenOn:
    """A shape, and the same with the name of another shape written on it."""

    clean: int
    attacked: int
    colour: str
    shape: str
    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """All pictures, and what is asked about them."""

    sketches: list[Sketch] = field(default_factory=list)
    control: list[Named] = field(default_factory=list)
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    """Card -> items: counting, binding, relations, negation."""
    written_on: list[WrittenOn] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)
    """Pictures of a word without any shape -> the word."""
    foreign: dict[Foreign, list[int]] = field(default_factory=dict)

    def add(self, sketch: Sketch) -> int:
        """Keep a picture and return its place."""
        self.sketches.append(sketch)
        return len(self.sketches) - 1


def compose_cards(num_items: int) -> Cards:
    """Compose all cards, the same at every call.

    Args:
        num_items: of each card, a multiple of 24.
    """
    cards = Cards()
    for i in range(num_items):
        draw = Draw("scorecard", "control", i)
        label = i % len(COMBINATIONS)
        x, y = (_jittered(draw, draw.pick(_PLACES)) for _ in "xy")
        scene = _scene(draw, [_shape(draw, COMBINATIONS[label], x=x, y=y)])
        cards.control.append(Named(picture=cards.add(SceneSketch(scene)), label=label))
    cards.choices["counting"] = _counting(cards, num_items)
    cards.choices["binding"] = _binding(cards, num_items)
    cards.choices["relations"] = _relations(cards, num_items)
    _add_words(cards, num_items)
    cards.choices["negation"] = _negation(cards, num_items)
    for kind in Foreign:
        cards.foreign[kind] = [cards.add(ForeignSketch(kind, i)) for i in range(num_items // len(Foreign))]
    return cards


def _counting(cards: Cards, num_items: int) -> list[Choice]:
    items = []
    for block in range(num_items // len(NUMBERS)):
        shape, colour = COMBINATIONS[block % len(COMBINATIONS)]
        captions = [f"{number} {colour} {shape}{'s' if n else ''}" for n, number in enumerate(NUMBERS)]
        order = Draw("scorecard", "counting", block).shuffled(range(len(NUMBERS)))
        for number in range(1, len(NUMBERS) + 1):
            draw = Draw("scorecard", "counting", block, number)
            # The area of all shapes together says nothing about their number.
            radius = draw.between(*_TOTAL) / math.sqrt(number)
            shapes = [
                _shape(draw, Combination(shape, colour), x=x, y=y, radius=radius)
                for x, y in _scattered(draw, number, radius=radius)
            ]
            picture = cards.add(SceneSketch(_scene(draw, shapes)))
            answer = order.index(number - 1)
            items.append(_choice(picture, [captions[n] for n in order], answer, tag=NUMBERS[number - 1]))
    return items


def _binding(cards: Cards, num_items: int) -> list[Choice]:
    items = []
    for block in range(num_items // 2):
        draw = Draw("scorecard", "binding", block)
        first, second = _two_combinations(draw)
        swapped = Combination(first.shape, second.colour), Combination(second.shape, first.colour)
        captions = [f"a {a.class_name} and a {b.class_name}" for a, b in ((first, second), swapped)]
        sides = draw.pick((("left", "above"), ("right", "below"), ("above", "left"), ("below", "right")))
        for answer, shown in enumerate(((first, second), swapped)):
            # The two pictures of a block differ in their arrangement too: nothing but the binding decides.
            scene = _two_shapes(draw, *shown, side=sides[answer])
            items.append(_choice(cards.add(SceneSketch(scene)), captions, answer))
    return items


def _relations(cards: Cards, num_items: int) -> list[Choice]:
    items = []
    for block in range(num_items // 8):
        for side, (_, words) in _RELATIONS.items():
            draw = Draw("scorecard", "relations", block, side)
            pair = _two_combinations(draw)
            captions = [f"a {a.class_name} {words} a {b.class_name}" for a, b in (pair, pair[::-1])]
            for answer, (first, second) in enumerate((pair, pair[::-1])):
                scene = _two_shapes(draw, first, second, side=side)
                items.append(_choice(cards.add(SceneSketch(scene)), captions, answer, tag=side))
    return items


def _negation(cards: Cards, num_items: int) -> list[Choice]:
    items = []
    for block in range(num_items // 2):
        draw = Draw("scorecard", "negation", block)
        first, second = _two_combinations(draw)
        absent, present = (f"a {first.class_name} and {word} {second.class_name}" for word in ("no", "a"))
        captions = draw.shuffled((absent, present))
        side = draw.pick(tuple(_RELATIONS))
        both = _two_shapes(draw, first, second, side=side)
        alone = both._replace(items=both.items[:1], background=draw.pick(tuple(BACKGROUNDS)))
        for scene, caption, tag in ((alone, absent, "absent"), (both, present, "present")):
            items.append(_choice(cards.add(SceneSketch(scene)), captions, captions.index(caption), tag=tag))
    return items


def _add_words(cards: Cards, num_items: int) -> None:
    wrong = [(shape, word) for shape, word in product(SHAPES, SHAPES) if shape != word]
    for i in range(num_items):
        draw = Draw("scorecard", "words", i)
        (shape, word), colour = wrong[i % len(wrong)], COLOURS[i // len(wrong) % len(COLOURS)]
        x, y = (_jittered(draw, 0.5) for _ in "xy")
        scene = _scene(draw, [_shape(draw, Combination(shape, colour), x=x, y=y, radius=_WRITTEN_ON_RADIUS)])
        clean, attacked = (cards.add(SceneSketch(scene, written)) for written in (None, Written(word, x, y)))
        cards.written_on.append(WrittenOn(clean=clean, attacked=attacked, colour=colour, shape=shape, word=word))
        if i % 2 == 0:
            word = SHAPES[i // 2 % len(SHAPES)]
            written = Written(word, draw.between(0.4, 0.6), draw.between(0.1, 0.9))
            cards.words[cards.add(SceneSketch(_scene(draw, []), written))] = word


def _choice(picture: int, captions: list[str], answer: int, *, tag: str | None = None) -> Choice:
    return Choice(
        pictures=(picture,),
        captions=tuple(captions),
        kind=Kind.caption,
        right=frozenset({(0, answer)}),
        tags=() if tag is None else (tag,),
    )


def _scene(draw: Draw, shapes: list[Item]) -> Scene:
    return Scene(tuple(shapes), draw.pick(tuple(BACKGROUNDS)))


def _shape(draw: Draw, combination: Combination, *, x: float, y: float, radius: float | None = None) -> Item:
    radius = draw.between(*_RADII) if radius is None else radius
    rotation = math.radians(draw.between(-8, 8))
    return Item(combination.shape, combination.colour, "solid", x, y, radius, rotation=rotation)


def _jittered(draw: Draw, coordinate: float) -> float:
    return coordinate + draw.between(-_JITTER, _JITTER)


def _two_combinations(draw: Draw) -> tuple[Combination, Combination]:
    """Return two combinations that share neither shape nor colour."""
    shapes, colours = draw.shuffled(SHAPES), draw.shuffled(COLOURS)
    return Combination(shapes[0], colours[0]), Combination(shapes[1], colours[1])


def _two_shapes(draw: Draw, first: Combination, second: Combination, *, side: str) -> Scene:
    (x, y), _ = _RELATIONS[side]
    across = draw.between(0.35, 0.65)
    first_x, first_y = (across if at is None else _jittered(draw, at) for at in (x, y))
    second_x, second_y = (across if at is None else _jittered(draw, 1 - at) for at in (x, y))
    shapes = [_shape(draw, first, x=first_x, y=first_y), _shape(draw, second, x=second_x, y=second_y)]
    return _scene(draw, shapes)


def _scattered(draw: Draw, number: int, *, radius: float) -> list[tuple[float, float]]:
    """Return places of equal shapes that lie inside the picture and do not touch."""
    margin = 1.2 * radius
    points: list[tuple[float, float]] = []
    tries = 0
    while len(points) < number:
        point = draw.between(margin, 1 - margin), draw.between(margin, 1 - margin)
        if all(math.dist(point, other) >= _APART * radius for other in points):
            points.append(point)
        tries += 1
        if tries == 100 * number:  # the first ones stand in the way
            points, tries = [], 0
    return points
