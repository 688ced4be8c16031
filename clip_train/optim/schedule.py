"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, total_steps: int, schedule: str) -> float:
    """Return the learning rate of the update that `step` makes, counted from 0.

    It rises linearly from peak / warmup, reaching `peak` in the last of the `warmup` steps; then it stays (`constant`)
    or falls along half a cosine (`cosine`) that would reach 0 at `total_steps`, one step after the last update.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
