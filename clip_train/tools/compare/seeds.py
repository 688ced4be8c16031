"""How far a difference of means holds over training seeds: Welch's t-interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clip_train.tools.compare.paired_bootstrap import Interval

_CONFIDENCE = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)  # [64] each, on [-1, 1]
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """The difference of the means of two sides' seeds."""

    num_first: int
    num_second: int
    interval: Interval | None
    """95 % of second minus first over the choice of seeds; None where no score of a side differs from its others."""
    degrees_of_freedom: float | None

    @property
    def show_difference(self) -> bool:
        """Whether the interval is on one side of zero."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def welch(first: np.ndarray, second: np.ndarray) -> Seeds:
    """Compare the means of two samples whose spreads may differ (Welch 1947).

    Args:
        first: [n] scores of one side's seeds, at least two.
        second: [m] scores of the other's.
    """
    errors = [float(np.var(side, ddof=1)) / len(side) for side in (first, second)]
    if np.ptp(first) == np.ptp(second) == 0:
        return Seeds(num_first=len(first), num_second=len(second), interval=None, degrees_of_freedom=None)
    shares = [error / math.fsum(errors) for error in errors]
    freedom = 1 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (first, second), strict=True))
    half = t_quantile(freedom) * math.sqrt(math.fsum(errors))
    difference = float(np.mean(second) - np.mean(first))
    return Seeds(
        num_first=len(first), num_second=len(second), interval=Interval(difference - half, difference + half),
        degrees_of_freedom=freedom,
    )  # fmt: skip


def t_quantile(freedom: float) -> float:
    """Return the t that Student's |t| of so many degrees of freedom (1 or more) stays below with 95 %.

    With t = sqrt(freedom) tan(x) its density is proportional to cos(x)^(freedom - 1).
    """
    factor = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        density = np.cos(middle / 2 * (_NODES + 1)) ** (freedom - 1)
        below = factor * middle / 2 * float(_WEIGHTS @ density)
        low, high = (middle, high) if below < _CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
