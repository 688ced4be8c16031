"""Logistic regression by L-BFGS on features that are spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.distributed.collectives import all_reduce

if TYPE_CHECKING:
    from clip_train.distributed.world import World

MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # of the largest gradient of the mean loss, scikit-learn's
HISTORY = 10
CHUNK_ELEMENTS = 2**24  # logits held at once
STEPS_PER_DECADE = 8
EXPONENTS = (-6, 6)


class Rows(NamedTuple):
    """This rank's rows of a labelled set of features."""

    features: Tensor  # [n, W]
    targets: Tensor  # [n] int64 in [0, C), or [n, C] bool where a row may belong to several classes

    def among(self, chosen: Tensor) -> Rows:
        """Return the rows of a choice [n] bool."""
        return Rows(self.features[chosen], self.targets[chosen])


class Solution(NamedTuple):
    """A fitted classifier."""

    weights: Tensor  # [K, W + 1], the last column is the intercept; K is 1 for two exclusive classes, else C
    iterations: int

    def logits(self, features: Tensor) -> Tensor:
        """Return [n, C] of features [n, W]; of two exclusive classes the first has 0."""
        logits = features @ self.weights[:, :-1].T + self.weights[:, -1]
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if len(self.weights) == 1 else logits


def fit(
    rows: Rows,
    *,
    c: float,
    num_classes: int,
    world: World,
    start: Solution | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    before_each: Callable[[], object] = lambda: None,
) -> Solution:
    """Minimise the mean log loss over all ranks' rows + |weights|² / (2 C n), the intercepts free.

    scikit-learn's `LogisticRegression(C=c)`: exclusive classes have one softmax, two of them one weight vector; where a
    row may belong to several classes, each class has a regression of its own. Called by every rank; all get the same.

    Args:
        rows: of this rank; their features decide type and device.
        c: inverse strength of the penalty.
        num_classes: C.
        world: the ranks.
        start: where to begin; all zeros if None. It changes the time, not the result.
        max_iterations: of L-BFGS.
        tolerance: largest gradient at which it stops.
        before_each: called before each pass over the rows, as often on every rank; may leave by an exception.
    """
    features = rows.features
    outputs = 1 if rows.targets.ndim == 1 and num_classes == 2 else num_classes
    total = int(all_reduce(torch.tensor(len(features), device=features.device), world=world))
    weights = torch.zeros(outputs, features.shape[1] + 1, dtype=features.dtype, device=features.device)
    if start is not None:
        weights.copy_(start.weights)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=tolerance, tolerance_change=0,
        history_size=HISTORY, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        before_each()
        loss, gradient = _loss_and_gradient(rows, weights)
        summed = all_reduce(torch.cat([loss[None], gradient.flatten()]), world=world) / total
        penalty = weights / (c * total)
        penalty[:, -1] = 0
        weights.grad = summed[1:].view_as(weights) + penalty
        return summed[0] + (weights * penalty).sum() / 2

    optimizer.step(closure)
    return Solution(weights, int(optimizer.state[weights]["n_iter"]))


def _loss_and_gradient(rows: Rows, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss [] of this rank's rows and its gradient [K, W + 1], a piece of the rows at a time."""
    loss, gradient = weights.new_zeros(()), torch.zeros_like(weights)
    per_piece = max(1, CHUNK_ELEMENTS // len(weights))
    for features, targets in zip(rows.features.split(per_piece), rows.targets.split(per_piece), strict=True):
        logits = torch.addmm(weights[:, -1], features, weights[:, :-1].T)  # [n, K]
        if targets.ndim == 1 and len(weights) > 1:
            loss += F.cross_entropy(logits, targets, reduction="sum")
            slope = logits.softmax(dim=1)
            slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        else:
            wanted = targets.view(logits.shape).to(logits.dtype)
            loss += F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            slope = logits.sigmoid() - wanted
        gradient[:, :-1] += slope.T @ features
        gradient[:, -1] += slope.sum(dim=0)
    return loss, gradient


def search_c(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Find the C of the highest score among 97 from 1e-6 to 1e6, eight per decade.

    Seven of them first, then twice as fine around the best, down to neighbours: a "parametric binary search" (CLIP,
    Radford et al. 2021, appendix A.3). Of equal scores the smaller C wins.

    Args:
        score: of a C; called once for each.

    Returns:
        The best C, and the score of each that was tried.
    """
    last = (EXPONENTS[1] - EXPONENTS[0]) * STEPS_PER_DECADE
    step, scores = 2 * STEPS_PER_DECADE, dict[int, float]()
    places = range(0, last + 1, step)
    while True:
        scores |= {place: score(_c_at(place)) for place in places if place not in scores}
        best = max(scores, key=lambda place: (scores[place], -place))
        if step == 1:
            return _c_at(best), {_c_at(place): scores[place] for place in sorted(scores)}
        step //= 2
        places = range(max(0, best - step), min(last, best + step) + 1, step)


def _c_at(place: int) -> float:
    return 10.0 ** (EXPONENTS[0] + place / STEPS_PER_DECADE)
