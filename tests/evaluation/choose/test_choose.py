"""Choices against a float64 recomputation, item by item and pair by pair."""

import itertools

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.choose.choices import Choice, ChoiceSet, Kind, kind_and_pairs
from clip_train.evaluation.choose.evaluator import Choose
from clip_train.evaluation.choose.score import score
from tests.evaluation.toys import (
    ToyModel,
    ToySource,
    image_features_float64,
    random_pixels,
    text_feature_float64,
    toy_setting,
)

KINDS = ("caption", "pairs", "pictures")


def item(pictures, captions, answer, tags=()):
    kind, right = kind_and_pairs(answer, num_pictures=len(pictures), num_captions=len(captions))
    return Choice(pictures=tuple(pictures), captions=tuple(captions), kind=kind, right=right, tags=tuple(tags))


def make_items(kind, *, num_items, num_pictures, seed=3):
    """Return random items; several show the same picture, and some captions are asked for more than once."""
    rng = np.random.default_rng(seed)
    words = [f"caption {i}" for i in range(40)]
    items = []
    for i in range(num_items):
        tags = [["even", "odd"][i % 2]]
        if kind == "caption":
            captions = rng.choice(words, rng.integers(2, 6), replace=False).tolist()
            answer = int(rng.integers(len(captions))) if i % 3 else [[0, 0], [0, 1]][: len(captions) - 1]
            items.append(item([int(rng.integers(num_pictures))], captions, answer, tags))
        elif kind == "pairs":
            n = int(rng.integers(2, 4))
            pairs = [[p, int(c)] for p, c in enumerate(rng.permutation(n))]
            pictures = rng.choice(num_pictures, n, replace=False).tolist()
            items.append(item(pictures, rng.choice(words, n, replace=False).tolist(), pairs, tags))
        else:
            n = int(rng.integers(4, 8))
            pictures = rng.choice(num_pictures, n, replace=False).tolist()
            answer = rng.choice(n, int(rng.integers(1, 4)), replace=False).tolist()
            items.append(item(pictures, [words[rng.integers(40)]], answer, tags))
    return items


def make(num_pictures, *, kind="caption", world=None, batch_size=4, **reader):
    items = make_items(kind, num_items=3 * num_pictures, num_pictures=num_pictures)
    choices = ChoiceSet(source=ToySource(num_pictures), items=items, keys=[f"item {i}" for i in range(len(items))])
    pixels = random_pixels(num_pictures)
    setting = toy_setting(pixels, world=world or World(), batch_size=batch_size, **reader)
    return Choose(choices, setting=setting), pixels


def oracle(model, pixels, items):
    """Return each item's metrics by comparing every right pair with every wrong one."""
    pictures = image_features_float64(model, pixels)
    found = []
    for one in items:
        cosine = {
            (p, c): float(pictures[picture] @ text_feature_float64(model, caption))
            for p, picture in enumerate(one.pictures)
            for c, caption in enumerate(one.captions)
        }
        wrong = cosine.keys() - one.right
        if one.kind == "pictures":
            chosen = set(sorted(cosine, key=cosine.get, reverse=True)[: len(one.right)])
            found.append({"jaccard": len(chosen & one.right) / len(chosen | one.right)})
            continue
        text = all(cosine[r] > cosine[w] for r in one.right for w in wrong if r[0] == w[0])
        image = all(cosine[r] > cosine[w] for r in one.right for w in wrong if r[1] == w[1])
        both = {"text_acc": text, "image_acc": image, "acc": text and image}
        found.append(both if one.kind == "pairs" else {"text_acc": text})
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_pictures", [9, 37])
def test_scores_equal_the_float64_oracle(kind, num_pictures):
    evaluator, pixels = make(num_pictures, kind=kind)
    model = ToyModel()
    result = evaluator.evaluate(model)
    items = evaluator.choices.items
    expected = oracle(model, pixels, items)
    for name in expected[0]:
        assert result.metrics[name] == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-12)
        for tag in ("even", "odd"):
            of_tag = [e[name] for e, one in zip(expected, items, strict=True) if tag in one.tags]
            assert result.parts[tag].metrics[name] == pytest.approx(np.mean(of_tag), abs=1e-12)
            assert result.parts[tag].num_items == len(of_tag)
        low, high = result.intervals[name]
        assert low <= result.metrics[name] <= high


@pytest.mark.parametrize(
    ("num_pictures", "num_captions", "answer"),
    [
        (1, 2, 0),
        (1, 5, [[0, 1], [0, 3]]),
        (2, 2, [[0, 0], [1, 1]]),
        (3, 3, [[0, 2], [1, 0], [2, 1]]),
        (10, 1, [2, 3, 9]),
    ],
)
def test_chance_is_what_independent_cosines_reach(num_pictures, num_captions, answer):
    one = item(range(num_pictures), [str(c) for c in range(num_captions)], answer)
    cosines = np.random.default_rng(0).random((4_000, num_pictures, num_captions))
    result = score([one] * len(cosines), list(cosines))
    for name, value in result.metrics.items():
        assert value == pytest.approx(result.chance[name], abs=0.03)


def test_winoground_has_its_published_chance_levels():
    result = score([item([0, 1], ["a", "b"], [[0, 0], [1, 1]])], [np.eye(2)])
    assert result.chance == pytest.approx({"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6})
    assert result.metrics == {"text_acc": 1, "image_acc": 1, "acc": 1}


@pytest.mark.parametrize(
    ("one", "metric"),
    [
        (item([0], ["a", "b"], 0), "text_acc"),
        (item([0], ["a", "b"], 1), "text_acc"),
        (item([0, 1], ["a", "b"], [[0, 0], [1, 1]]), "acc"),
        (item([0, 1, 2, 3], ["a"], [0, 1]), "jaccard"),
    ],
)
def test_a_tie_is_not_right_wherever_the_answer_stands(one, metric):
    result = score([one], [np.ones((len(one.pictures), len(one.captions)))])
    assert result.metrics[metric] == 0
    assert "1 of 1 items have a wrong answer exactly as near" in result.warnings[0]


def test_captions_that_the_model_cannot_tell_apart_tie_in_spite_of_rounding():
    choices = ChoiceSet(
        source=ToySource(9),
        items=[item([i], ["same", "other", "same"], 0) for i in range(9)],
        keys=[str(i) for i in range(9)],
    )
    setting = toy_setting(random_pixels(9), world=World(), batch_size=4)
    assert Choose(choices, setting=setting).evaluate(ToyModel()).metrics == {"text_acc": 0}


def test_a_cut_through_a_tie_of_right_pictures_costs_nothing():
    one = item([0, 1, 2, 3], ["a"], [0, 2])
    result = score([one], [np.array([[0.5], [0.1], [0.5], [0.1]])])
    assert result.metrics == {"jaccard": 1}
    assert not result.warnings


def test_a_collapsed_model_gets_a_reason_and_no_score():
    model = ToyModel()
    model.text_weight = torch.ones_like(model.text_weight)
    result = make(20)[0].evaluate(model)
    assert result.metrics == {} and result.parts == {}
    assert "text features" in result.collapsed


def test_a_picture_that_is_skipped_is_an_error_and_not_a_score():
    with pytest.raises(IntegrityError, match="saw 9 images"):
        make(10, leave_out=3)[0].evaluate(ToyModel())


@pytest.mark.parametrize(
    ("answer", "num_pictures", "num_captions", "kind"),
    [
        (1, 1, 2, Kind.caption),
        ([[0, 0], [0, 2]], 1, 3, Kind.caption),
        ([2, 0], 5, 1, Kind.pictures),
        ([[0, 1], [1, 0]], 2, 2, Kind.pairs),
    ],
)
def test_the_answer_tells_what_is_asked(answer, num_pictures, num_captions, kind):
    assert kind_and_pairs(answer, num_pictures=num_pictures, num_captions=num_captions)[0] is kind


@pytest.mark.parametrize(
    ("answer", "num_pictures", "num_captions"),
    [
        (2, 1, 2), (-1, 1, 2), (True, 1, 2), ("0", 1, 2), (0, 2, 2), (0, 1, 1), ([], 3, 1), ([0, 0], 3, 1),
        ([0, 1, 2], 3, 1), ([3], 3, 1), ([[0, 0], [1, 0]], 2, 2), ([[0, 0]], 2, 2), ([[0, 0, 0]], 1, 2), (None, 1, 2),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_refused(answer, num_pictures, num_captions):
    with pytest.raises(UserError, match="answer="):
        kind_and_pairs(answer, num_pictures=num_pictures, num_captions=num_captions)


def test_the_pictures_of_the_report_show_the_nearest_caption_first():
    evaluator, pixels = make(37)
    model = ToyModel()
    result = evaluator.evaluate(model)
    evaluator.choices.source.read = lambda i: _png(pixels[i])
    samples = evaluator.samples(result, size=4)
    expected = oracle(model, pixels, evaluator.choices.items)
    places = np.unique(np.linspace(0, 110, 24).round().astype(int))
    for place, answer in zip(places, samples.answers, strict=True):
        assert answer.right == expected[place]["text_acc"]
        assert answer.cosines == sorted(answer.cosines, reverse=True)
        assert all(a >= b for a, b in itertools.pairwise(answer.cosines))
        assert set(answer.truth) <= set(answer.answers)


def _png(pixels):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
