"""Gradient norms that stand out: most loss spikes begin with one, and its batch is worth a look."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

HISTORY_STEPS = 200
FEWEST_STEPS = 50  # of history to judge by
OUTLIER = 8.0  # robust standard deviations of the logarithm, and
_TIMES_MEDIAN = 3.0
_FLOOR = 0.01  # of the deviation: norms that hardly vary make no outliers of small changes


class Outlier(NamedTuple):
    """A step whose gradient was far larger than those before it."""

    step: int
    norm: float
    usual: float  # median of the steps before
    zscore: float


class GradientNorms:
    """Collects the norm of every step on the device, and judges those since the last row when one is logged."""

    def __init__(self) -> None:
        self._new: list[tuple[int, Tensor]] = []
        self._history: deque[float] = deque(maxlen=HISTORY_STEPS)  # logarithms

    def add(self, norm: Tensor, *, step: int) -> None:
        """Keep the norm [] of a step without waiting for it."""
        self._new.append((step, norm.detach()))

    def judge(self) -> tuple[dict[str, float], list[Outlier]]:
        """Return the highest robust z-score of the new steps, for the log, and the outliers among them.

        The score of a step is the distance of its norm's logarithm from the median of the 200 steps before, in units of
        1.4826 times their median absolute deviation, which for normal values is the standard deviation.
        """
        new, self._new = self._new, []
        highest, outliers = -math.inf, []
        norms = torch.stack([norm for _, norm in new]).tolist() if new else []
        for (step, _), norm in zip(new, norms, strict=True):
            if not (math.isfinite(norm) and norm > 0):  # a fault, judged elsewhere
                continue
            if len(self._history) >= FEWEST_STEPS:
                middle = median(self._history)
                deviation = 1.4826 * median(abs(value - middle) for value in self._history)
                zscore = (math.log(norm) - middle) / max(deviation, _FLOOR)
                highest = max(highest, zscore)
                if zscore > OUTLIER and norm > _TIMES_MEDIAN * math.exp(middle):
                    outliers.append(Outlier(step, norm, math.exp(middle), zscore))
            self._history.append(math.log(norm))
        return ({"train/grad_norm_zscore": highest} if math.isfinite(highest) else {}), outliers
