"""Scores against what an all-seeing and a blind model must get, and a recomputation of what lies between."""

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluation.scorecard.cards import COMBINATIONS, NUMBERS, SHAPES, compose_cards
from clip_train.evaluation.scorecard.config import ScorecardConfig
from clip_train.evaluation.scorecard.evaluator import Scorecard
from clip_train.evaluation.scorecard.score import score_cards
from clip_train.evaluation.scorecard.verdict import Measured, judge, judge_control
from tests.evaluation.toys import ToyModel, random_pixels, toy_setting

CARDS = ["control", "counting", "binding", "relations", "rendered_words", "negation", "out_of_distribution"]


@pytest.fixture(scope="module")
def cards():
    return compose_cards(48)


def perfect(cards):
    """Cosines of a model that knows everything and is fooled by nothing."""
    of_class = np.zeros((len(cards.sketches), len(COMBINATIONS)))
    names = [(c.shape, c.colour) for c in COMBINATIONS]
    for place, sketch in enumerate(cards.sketches):
        for item in getattr(getattr(sketch, "scene", None), "items", ()):
            of_class[place, names.index((item.shape, item.colour))] = 1
    for place, word in cards.words.items():
        of_class[place, names.index((word, "red"))] = 0.5
    captions = [right_caption(item) for items in cards.choices.values() for item in items]
    return of_class, captions


def right_caption(item):
    cosine = np.zeros((1, len(item.captions)))
    cosine[tuple(np.array(list(item.right)).T)] = 1
    return cosine


def scores(cards, of_class, captions):
    found = score_cards(cards, class_cosines=of_class, caption_cosines=captions)
    assert [card.name for card in found] == CARDS
    return {card.name: card for card in found}


def test_a_model_that_knows_everything_has_full_marks(cards):
    found = scores(cards, *perfect(cards))
    assert {name: card.measured.score for name, card in found.items()} == dict.fromkeys(CARDS, 1.0)
    assert "mean absolute error 0.00, guessing 1.94" in found["counting"].note
    assert (
        "answer in 0.0 % (0.0 % if it were not read); words alone are read in 100.0 %" in found["rendered_words"].note
    )
    assert "in 100.0 % of the pictures without the object, in 0.0 % of" in found["negation"].note


def test_a_model_that_sees_nothing_is_never_right_on_choices_and_never_certain(cards):
    of_class, captions = perfect(cards)
    found = scores(cards, np.zeros_like(of_class), [np.zeros_like(c) for c in captions])
    for name in ("counting", "binding", "relations", "negation"):
        assert found[name].measured.score == 0  # ties are not right
    assert found["control"].measured.score == pytest.approx(1 / 24)
    assert found["out_of_distribution"].measured.score == 0.5


def test_a_model_that_reads_is_caught_by_the_words(cards):
    of_class, captions = perfect(cards)
    names = [(c.shape, c.colour) for c in COMBINATIONS]
    for one in cards.written_on:
        of_class[one.attacked, names.index((one.word, one.colour))] = 2
    card = scores(cards, of_class, captions)["rendered_words"]
    assert card.measured.score == 0
    assert card.parts["answer_is_the_word"].metrics == {"rendered_words": 1.0}
    assert card.parts["clean"].metrics == {"rendered_words": 1.0}


def test_a_model_that_reads_mentions_prefers_one_caption_whatever_it_sees(cards):
    of_class, captions = perfect(cards)
    items = [item for own in cards.choices.values() for item in own]
    captions = [
        np.array([[float(" no " not in caption) for caption in item.captions]]) if len(item.captions) == 2 else cosine
        for item, cosine in zip(items, captions, strict=True)
    ]
    card = scores(cards, of_class, captions)["negation"]
    assert card.measured.score == 0.5
    assert {tag: part.metrics["negation"] for tag, part in card.parts.items()} == {"absent": 0, "present": 1}


def test_scores_lie_where_a_recomputation_puts_them(cards):
    rng = np.random.default_rng(0)
    of_class = rng.random((len(cards.sketches), len(COMBINATIONS)))
    captions = [rng.random((1, len(i.captions))) for items in cards.choices.values() for i in items]
    found = scores(cards, of_class, captions)
    assert found["control"].measured.score == np.mean([of_class[o.picture].argmax() == o.label for o in cards.control])
    right, errors = [], []
    for item, cosine in zip(cards.choices["counting"], captions[:48], strict=True):
        says = item.captions[cosine[0].argmax()].split()[0]
        right.append(says == item.tags[0])
        errors.append(abs(NUMBERS.index(says) - NUMBERS.index(item.tags[0])))
    assert found["counting"].measured.score == np.mean(right)
    assert f"mean absolute error {np.mean(errors):.2f}" in found["counting"].note
    kept = []
    for one in cards.written_on:
        four = {s: of_class[one.attacked][[*COMBINATIONS].index((s, one.colour))] for s in SHAPES}
        kept.append(max(four, key=four.get) == one.shape)
    assert found["rendered_words"].measured.score == np.mean(kept)
    known = [of_class[o.picture].max() for o in cards.control]
    foreign = [of_class[p].max() for own in cards.foreign.values() for p in own]
    wins = np.mean([k > f for k in known for f in foreign])
    assert found["out_of_distribution"].measured.score == pytest.approx(wins)


@pytest.mark.parametrize(
    ("card", "control", "verdict"),
    [
        ((0.95, 0.5, (0.93, 0.97)), (0.98, 0.04, (0.96, 0.99)), "good: 92 % of the control"),
        ((0.80, 0.5, (0.76, 0.84)), (0.98, 0.04, (0.96, 0.99)), "partly: 61 % of the control"),
        ((0.60, 0.5, (0.56, 0.64)), (0.98, 0.04, (0.96, 0.99)), "weak: 20 % of the control"),
        ((0.52, 0.5, (0.48, 0.56)), (0.98, 0.04, (0.96, 0.99)), "pitfall: no better than guessing"),
        ((0.40, 0.5, (0.36, 0.44)), (0.98, 0.04, (0.96, 0.99)), "pitfall: worse than guessing"),
        ((0.52, 0.5, (0.48, 0.56)), (0.05, 0.04, (0.03, 0.07)), "not judged: the control fails"),
        ((0.95, 0.5, (0.93, 0.97)), (0.15, 0.04, (0.12, 0.18)), "not judged: the control fails"),
    ],
)
def test_a_verdict_is_relative_to_the_control(card, control, verdict):
    assert judge(Measured(*card), control=Measured(*control)) == verdict


def test_blindness_is_not_mistaken_for_a_pitfall():
    assert judge_control(Measured(0.05, 0.04, (0.03, 0.07))).startswith("cannot see these drawings")
    assert judge_control(Measured(0.98, 0.04, (0.96, 0.99))) == "sees these drawings"
    seen, blind = Measured(0.98, 0.04, (0.96, 0.99)), Measured(0.3, 0.25, (0.2, 0.4))
    assert judge(seen, control=seen, own=blind) == "not judged: the control fails"


def make(num_items, *, world=None, batch_size=16, **reader):
    num_pictures = len(compose_cards(num_items).sketches)
    setting = toy_setting(random_pixels(num_pictures), world=world or World(), batch_size=batch_size, **reader)
    return Scorecard(num_items, setting=setting)


def test_every_card_has_score_interval_chance_and_verdict():
    result = make(24).evaluate(ToyModel())
    for values in (result.metrics, result.chance, result.intervals, result.verdicts):
        assert list(values) == CARDS
    assert result.num_items == 24
    assert result.verdicts["control"].startswith("cannot see")
    assert set(list(result.verdicts.values())[1:]) == {"not judged: the control fails"}


def test_a_collapsed_model_gets_a_reason_and_neither_score_nor_verdict():
    model = ToyModel()
    model.text_weight = torch.ones_like(model.text_weight)
    result = make(24).evaluate(model)
    assert "text features" in result.collapsed
    assert not (result.metrics or result.verdicts or result.notes or result.parts)


def test_the_report_shows_pictures_of_each_card():
    evaluator = make(24)
    result = evaluator.evaluate(ToyModel())
    samples = evaluator.samples(result, size=32)
    assert samples.pictures.shape == (24, 32, 32, 3)
    assert len(samples.answers) == 24
    assert samples.answers[0].truth == ["red circle"]
    for answer in samples.answers:
        assert answer.cosines == sorted(answer.cosines, reverse=True)
        assert answer.right == (answer.answers[0] == answer.truth[0])


@pytest.mark.parametrize("items", [0, 12, 100, -24])
def test_items_that_cannot_be_balanced_are_refused(items):
    with pytest.raises(UserError, match=f"items={items} must be a multiple of 24"):
        ScorecardConfig(items=items)
