"""Say in a few words what a score means beside a control."""

from __future__ import annotations

from typing import NamedTuple

SEEN = 0.25  # of the way from chance to 1, below which nothing follows from the other cards
PARTLY, MOSTLY = 0.5, 0.8  # of the control's way above chance


class Measured(NamedTuple):
    """A score with what it is compared with."""

    score: float
    chance: float
    interval: tuple[float, float]

    @property
    def above_chance(self) -> float:
        """The share of the way from chance to 1."""
        return (self.score - self.chance) / (1 - self.chance)

    @property
    def is_guessing(self) -> bool:
        """The interval holds the level of guessing."""
        return self.interval[0] <= self.chance <= self.interval[1]


def judge_control(control: Measured) -> str:
    """Say whether the model recognises plain drawings at all."""
    if sees(control):
        return "sees these drawings"
    return "cannot see these drawings: the other cards say nothing about it"


def sees(control: Measured) -> bool:
    """Say whether a control is good enough for others to be compared with it."""
    return control.interval[0] > control.chance and control.above_chance >= SEEN


def judge(card: Measured, *, control: Measured, own: Measured | None = None) -> str:
    """Compare a card with its control, each by its way from chance to 1.

    Args:
        card: the score.
        control: of the control card: where it fails, nothing follows from any other.
        own: a control of the card's own, to compare it with instead.
    """
    beside = own or control
    if not (sees(control) and sees(beside)):
        return "not judged: the control fails"
    if card.is_guessing:
        return "pitfall: no better than guessing"
    if card.score < card.chance:
        return "pitfall: worse than guessing"
    share = card.above_chance / beside.above_chance
    word = "good" if share >= MOSTLY else "partly" if share >= PARTLY else "weak"
    return f"{word}: {100 * share:.0f} % of the control"
