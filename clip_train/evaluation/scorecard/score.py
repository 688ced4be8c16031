"""Score the cards from cosines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from clip_train.data.scenes.vocabulary import HELD_OUT
from clip_train.evaluation.choose.choices import Choice
from clip_train.evaluation.choose.score import score
from clip_train.evaluation.confidence import wilson_interval
from clip_train.evaluation.reject.metrics import auroc, intervals
from clip_train.evaluation.result import Part
from clip_train.evaluation.scorecard.cards import COMBINATIONS, NUMBERS, SHAPES, Cards
from clip_train.evaluation.scorecard.verdict import Measured

CARDS = ("control", "counting", "binding", "relations", "rendered_words", "negation", "out_of_distribution")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardScore:
    """What a card came to."""

    name: str
    measured: Measured
    parts: dict[str, Part] = field(default_factory=dict)
    """Scores of the items with each tag."""
    control: Measured | None = None
    """What the card is compared with; None: the control card."""
    note: str = ""
    """What else there is to say, as a line for a person."""
    right: np.ndarray | None = None
    """[N] bool, which items are answered rightly; None where the score is no share of items."""


def score_cards(cards: Cards, *, class_cosines: np.ndarray, caption_cosines: Sequence[np.ndarray]) -> list[CardScore]:
    """Score all `CARDS`, the control first.

    Args:
        cards: what was asked.
        class_cosines: [P, 24] of every picture with every one of `COMBINATIONS`.
        caption_cosines: [1, captions] of every choice, card after card.
    """
    found, first = {}, 0
    for name, items in cards.choices.items():
        found[name] = score_choices(name, items, caption_cosines[first : first + len(items)])
        first += len(items)
    found |= {
        card.name: card for card in (one(cards, class_cosines) for one in (score_control, score_words, score_foreign))
    }
    return [found[name] for name in CARDS]


def score_control(cards: Cards, class_cosines: np.ndarray) -> CardScore:
    """Score the naming of single shapes, apart for the combinations that the generator keeps out of its training."""
    labels = np.array([one.label for one in cards.control])
    right = class_cosines[[one.picture for one in cards.control]].argmax(axis=1) == labels
    held_out = np.array([combination in HELD_OUT for combination in COMBINATIONS])[labels]
    chance = 1 / len(COMBINATIONS)
    parts = {
        "seen": _share("control", right[~held_out], chance),
        "held_out": _share("control", right[held_out], chance),
    }
    names = ", ".join(combination.class_name for combination in COMBINATIONS if combination in HELD_OUT)
    percent = {tag: f"{100 * part.metrics['control']:.1f} %" for tag, part in parts.items()}
    return CardScore(
        name="control",
        measured=_measured(right, chance),
        right=right,
        parts=parts,
        note=f"{percent['held_out']} on {names}, which generated training pictures never show; "
        f"{percent['seen']} on the other combinations",
    )


def score_choices(name: str, items: Sequence[Choice], cosines: Sequence[np.ndarray]) -> CardScore:
    """Score a card of choices between captions."""
    result = score(items, cosines)
    parts = {
        tag: Part(
            num_items=part.num_items,
            metrics={name: part.metrics["text_acc"]},
            chance={name: part.chance["text_acc"]},
            intervals={name: part.intervals["text_acc"]},
        )
        for tag, part in result.parts.items()
    }
    measured = Measured(result.metrics["text_acc"], result.chance["text_acc"], result.intervals["text_acc"])
    note = _NOTES[name](items, cosines) if name in _NOTES else ""
    return CardScore(name=name, measured=measured, parts=parts, note=note, right=result.predictions["text_acc"])


def score_words(cards: Cards, class_cosines: np.ndarray) -> CardScore:
    """Score the naming of shapes with a wrong word on them, beside the same shapes without it."""
    rows = cards.written_on
    of_colour = np.array([[_class_of(shape, one.colour) for shape in SHAPES] for one in rows])  # [N, shapes]
    clean, attacked = (
        np.take_along_axis(class_cosines[places], of_colour, axis=1).argmax(axis=1)
        for places in ([one.clean for one in rows], [one.attacked for one in rows])
    )
    shape = np.array([SHAPES.index(one.shape) for one in rows])
    word = np.array([SHAPES.index(one.word) for one in rows])
    # Without a shape there is no colour: the nearest of all combinations decides.
    alone = class_cosines[list(cards.words)].argmax(axis=1) // (len(COMBINATIONS) // len(SHAPES))
    read = alone == np.array([SHAPES.index(written) for written in cards.words.values()])
    chance = 1 / len(SHAPES)
    parts = {
        "clean": _share("rendered_words", clean == shape, chance),
        "answer_is_the_word": _share("rendered_words", attacked == word, chance),
        "word_alone": _share("rendered_words", read, chance),
    }
    percent = {tag: f"{100 * part.metrics['rendered_words']:.1f} %" for tag, part in parts.items()}
    # Each shape bears each wrong word equally often: who does not read errs towards it in a third of the errors.
    unread = f"{100 * (attacked != shape).mean() / (len(SHAPES) - 1):.1f} %"
    return CardScore(
        name="rendered_words",
        measured=_measured(attacked == shape, chance),
        right=attacked == shape,
        parts=parts,
        control=_measured(clean == shape, chance),
        note=f"{percent['clean']} without a word; a wrong word on the shape is the answer in "
        f"{percent['answer_is_the_word']} ({unread} if it were not read); words alone are read in "
        f"{percent['word_alone']}",
    )


def score_foreign(cards: Cards, class_cosines: np.ndarray) -> CardScore:
    """Score how well the highest cosine tells the control's pictures from those that show nothing of the kind."""
    nearest = class_cosines.max(axis=1)
    known = nearest[[one.picture for one in cards.control]]
    parts = {}
    for kind, places in cards.foreign.items():
        foreign = nearest[places]
        parts[kind.value] = Part(
            num_items=len(places),
            metrics={"out_of_distribution": auroc(known, foreign)},
            chance={"out_of_distribution": 0.5},
            intervals={"out_of_distribution": intervals(known, foreign)["auroc"]},
        )
    foreign = nearest[[place for places in cards.foreign.values() for place in places]]
    measured = Measured(auroc(known, foreign), 0.5, intervals(known, foreign)["auroc"])
    by_kind = ", ".join(f"{kind} {100 * part.metrics['out_of_distribution']:.1f} %" for kind, part in parts.items())
    return CardScore(
        name="out_of_distribution", measured=measured, parts=parts, note=f"AUROC of the highest cosine: {by_kind}"
    )


def _note_of_counting(items: Sequence[Choice], cosines: Sequence[np.ndarray]) -> str:
    errors, guesses = [], []
    for item, cosine in zip(items, cosines, strict=True):
        numbers = np.array([NUMBERS.index(caption.split()[0]) for caption in item.captions])
        ((_, answer),) = item.right
        errors.append(abs(numbers[cosine[0].argmax()] - numbers[answer]))
        guesses.append(abs(numbers - numbers[answer]).mean())
    return f"mean absolute error {np.mean(errors):.2f}, guessing {np.mean(guesses):.2f}"


def _note_of_negation(items: Sequence[Choice], cosines: Sequence[np.ndarray]) -> str:
    says_no = [" no " in item.captions[cosine[0].argmax()] for item, cosine in zip(items, cosines, strict=True)]
    absent = np.array(["absent" in item.tags for item in items])
    share_absent, share_present = (100 * np.mean(np.array(says_no)[mask]) for mask in (absent, ~absent))
    return (
        f"the caption with `no` is preferred in {share_absent:.1f} % of the pictures without the object, in "
        f"{share_present:.1f} % of those with it"
    )


_NOTES: dict[str, Callable[[Sequence[Choice], Sequence[np.ndarray]], str]] = {
    "counting": _note_of_counting,
    "negation": _note_of_negation,
}


def _class_of(shape: str, colour: str) -> int:
    return next(i for i, c in enumerate(COMBINATIONS) if (c.shape, c.colour) == (shape, colour))


def _measured(right: np.ndarray, chance: float) -> Measured:
    return Measured(float(right.mean()), chance, wilson_interval(int(right.sum()), total=len(right)))


def _share(name: str, right: np.ndarray, chance: float) -> Part:
    value, _, interval = _measured(right, chance)
    return Part(
        num_items=len(right), metrics={name: value}, chance={name: chance}, intervals={name: interval}
    )  # fmt: skip
