"""Tell a bad model from a set whose classes are in another order than their names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clip_train.evaluation.confidence import wilson_interval

_NEAR_CHANCE = 3.0  # accuracy up to this many times chance
_CLEARLY_ABOVE = 3.0  # renamed classes must do so many times better
_MOST = 0.5  # of the classes must get an answer of their own, else a few answers are given to everything


def probable_permutation(labels: np.ndarray, predicted: np.ndarray, *, classnames: Sequence[str]) -> str | None:
    """Return a warning if the answers are near chance, but would be right if the classes were consistently renamed.

    The renaming is learnt on half of each class's images and judged on the other half: of pure guessing, the commonest
    answer of a class would seem a good name for it.

    Args:
        labels: [N] right class of each image.
        predicted: [N] first answer.
        classnames: C names.
    """
    accuracy = float((labels == predicted).mean())
    if accuracy > _NEAR_CHANCE / len(classnames):
        return None
    learn = _every_other(labels)
    renamed: dict[int, int] = {}
    for c in np.unique(labels):
        answers = predicted[learn & (labels == c)]
        if len(answers):
            renamed[int(c)] = int(np.bincount(answers).argmax())
    judged = ~learn & np.isin(labels, list(renamed))
    if not judged.any() or len(set(renamed.values())) < _MOST * len(renamed):
        return None
    right = sum(renamed[c] == p for c, p in zip(labels[judged].tolist(), predicted[judged].tolist(), strict=True))
    lowest, _ = wilson_interval(right, total=int(judged.sum()))
    if lowest <= _CLEARLY_ABOVE * max(accuracy, 1 / len(classnames)):
        return None
    moved = next(((c, p) for c, p in renamed.items() if c != p), None)
    example = f" (images of {classnames[moved[0]]!r} are called {classnames[moved[1]]!r})" if moved else ""
    return (
        f"probable permutation of the classes: {100 * accuracy:.1f} % are right, but {100 * right / judged.sum():.0f} "
        f"% would be with the classes renamed one by one{example}; check the order of class names against the labels"
    )


def _every_other(labels: np.ndarray) -> np.ndarray:
    """Return [N] bool, True for the first, third, … image of each class."""
    order = np.argsort(labels, kind="stable")
    first_of_class = np.searchsorted(labels[order], labels[order])
    learn = np.empty(len(labels), dtype=bool)
    learn[order] = (np.arange(len(labels)) - first_of_class) % 2 == 0
    return learn
