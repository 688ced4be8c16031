"""No shortcut beats guessing: what can be said from captions, order, length or simple looks alone is at chance."""

from collections import Counter, defaultdict
from zlib import crc32

import numpy as np
import pytest

from clip_train.data.scenes.draw import draw_scene
from clip_train.evaluation.scorecard.cards import COMBINATIONS, NUMBERS, SHAPES, compose_cards
from clip_train.evaluation.scorecard.pictures import SceneSketch, SketchImages

CHANCE = {"counting": 1 / 6, "binding": 1 / 2, "relations": 1 / 2, "negation": 1 / 2}


@pytest.fixture(scope="module")
def cards():
    return compose_cards(240)


def answer_of(item):
    ((_, answer),) = item.right
    return answer


def accuracy(items, choose):
    return np.mean([choose(item) == answer_of(item) for item in items])


@pytest.mark.parametrize("card", CHANCE)
@pytest.mark.parametrize(
    "shortcut",
    [
        lambda item: 0,
        lambda item: len(item.captions) - 1,
        lambda item: max(range(len(item.captions)), key=lambda c: len(item.captions[c])),
        lambda item: min(range(len(item.captions)), key=lambda c: len(item.captions[c])),
        lambda item: item.captions.index(min(item.captions)),
        lambda item: max(range(len(item.captions)), key=lambda c: crc32(item.captions[c].encode())),
    ],
    ids=["first", "last", "longest", "shortest", "alphabet", "any taste"],
)
def test_whoever_sees_only_the_captions_is_right_exactly_as_often_as_guessing(cards, card, shortcut):
    assert accuracy(cards.choices[card], shortcut) == pytest.approx(CHANCE[card], abs=1e-12)


@pytest.mark.parametrize("card", CHANCE)
def test_each_caption_of_a_set_is_right_equally_often(cards, card):
    right = defaultdict(Counter)
    for item in cards.choices[card]:
        right[item.captions][item.captions[answer_of(item)]] += 1
    for captions, counts in right.items():
        assert len(set(captions)) == len(captions)
        assert {counts[caption] for caption in captions} == {counts[captions[0]]}


def looks(cards, item):
    """What a blind eye could go by: ink, its mean colour, its centre, the background."""
    sketch = cards.sketches[item.pictures[0]]
    pixels = np.asarray(draw_scene(sketch.scene, image_size=64)).astype(np.float64)
    ink = np.abs(pixels - pixels[0, 0]).sum(axis=2)
    y, x = np.mgrid[:64, :64]
    centre = [(ink * x).sum() / ink.sum(), (ink * y).sum() / ink.sum()]
    return [(ink > 100).sum(), *pixels.mean(axis=(0, 1)), *centre, pixels[0, 0].sum()]


@pytest.mark.parametrize("card", CHANCE)
def test_whoever_sees_only_the_picture_cannot_know_which_caption_is_listed_where(cards, card):
    items = cards.choices[card]
    features = np.array([looks(cards, item) for item in items])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    answers = np.array([answer_of(item) for item in items])
    distance = np.linalg.norm(features[:, None] - features[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    guess = answers[distance.argmin(axis=1)]
    deviation = np.sqrt(CHANCE[card] * (1 - CHANCE[card]) / len(items))
    assert (guess == answers).mean() < CHANCE[card] + 3 * deviation


def test_the_area_of_all_shapes_says_nothing_about_their_number(cards):
    items = cards.choices["counting"]
    number = np.array([NUMBERS.index(item.tags[0]) + 1 for item in items])
    area = np.array([sum(s.radius**2 for s in cards.sketches[item.pictures[0]].scene.items) for item in items])
    ink = np.array([looks(cards, item)[0] for item in items])
    for size in (area, ink):
        residual = size.astype(float).copy()
        for shape in SHAPES:  # shapes of one radius differ in area
            of_shape = np.array([shape in item.captions[0] for item in items])
            residual[of_shape] -= residual[of_shape].mean()
        assert abs(np.corrcoef(number, residual)[0, 1]) < 0.2
    counted = [len(cards.sketches[item.pictures[0]].scene.items) for item in items]
    assert counted == number.tolist()


def test_counted_shapes_do_not_touch_and_lie_inside(cards):
    for item in cards.choices["counting"]:
        shapes = cards.sketches[item.pictures[0]].scene.items
        for i, one in enumerate(shapes):
            assert 1.1 * one.radius < min(one.x, one.y, 1 - one.x, 1 - one.y)
            for other in shapes[:i]:
                assert np.hypot(one.x - other.x, one.y - other.y) > 2.2 * one.radius


def test_captions_say_what_the_pictures_show(cards):
    for item in cards.choices["relations"]:
        first, second = cards.sketches[item.pictures[0]].scene.items
        caption = item.captions[answer_of(item)]
        assert caption.startswith(f"a {first.colour} {first.shape} ") and caption.endswith(
            f"a {second.colour} {second.shape}"
        )
        truly = {
            "to the left of": first.x < second.x - 0.3,
            "to the right of": first.x > second.x + 0.3,
            "above": first.y < second.y - 0.3,
            "below": first.y > second.y + 0.3,
        }
        assert next(true for words, true in truly.items() if words in caption)
    for item in cards.choices["binding"]:
        shown = {f"{s.colour} {s.shape}" for s in cards.sketches[item.pictures[0]].scene.items}
        right, wrong = (item.captions[i] for i in (answer_of(item), 1 - answer_of(item)))
        assert shown == set(right.removeprefix("a ").split(" and a "))
        assert sorted(right.split()) == sorted(wrong.split())
    for item in cards.choices["negation"]:
        shown = {f"{s.colour} {s.shape}" for s in cards.sketches[item.pictures[0]].scene.items}
        first, second = item.captions[answer_of(item)].removeprefix("a ").split(" and ")
        kind, _, second = second.partition(" ")
        assert first in shown and (second in shown) == (kind == "a")


def test_every_class_and_every_wrong_word_appears_equally_often(cards):
    assert set(Counter(one.label for one in cards.control).values()) == {10}
    for one in cards.control:
        (shape,) = cards.sketches[one.picture].scene.items
        assert (shape.shape, shape.colour) == COMBINATIONS[one.label]
    pairs = Counter((one.shape, one.word) for one in cards.written_on)
    assert len(pairs) == 12 and set(pairs.values()) == {20}
    assert set(Counter(cards.words.values()).values()) == {30}
    for one in cards.written_on:
        clean, attacked = cards.sketches[one.clean], cards.sketches[one.attacked]
        assert clean.scene == attacked.scene and clean.written is None and attacked.written.word == one.word


def test_the_cards_are_the_same_at_every_call_and_every_picture_is_asked_about(cards):
    assert compose_cards(240) == cards
    places = [one.picture for one in cards.control]
    places += [p for items in cards.choices.values() for item in items for p in item.pictures]
    places += [p for one in cards.written_on for p in (one.clean, one.attacked)]
    places += [*cards.words, *(p for own in cards.foreign.values() for p in own)]
    assert sorted(places) == list(range(len(cards.sketches)))


def test_a_written_word_changes_only_pixels_near_it(cards):
    one = cards.written_on[0]
    images = SketchImages(cards.sketches, image_size=96)
    from clip_train.data.images.decode import open_image

    clean, attacked = (np.asarray(open_image(images.read(p))).astype(int) for p in (one.clean, one.attacked))
    changed = np.abs(clean - attacked).sum(axis=2) > 0
    assert 100 < changed.sum() < 0.25 * changed.size
    assert not changed[: 96 // 4].any() and not changed[-96 // 4 :].any()
    assert isinstance(cards.sketches[one.clean], SceneSketch)
