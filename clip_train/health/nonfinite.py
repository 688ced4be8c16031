"""Decide what becomes of a run whose loss or gradient is not finite. The step itself never makes such an update."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from clip_train.errors import TrainingFailed
from clip_train.metrics.panel import say
from clip_train.schema import OnNonfinite

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.step import StepResult

MAX_SKIPPED_IN_A_ROW = 10
MAX_REWINDS = 3  # to one checkpoint


class NonfiniteSteps:
    """Watches for updates that were not made because something was not finite. Alike on all ranks.

    The flag of a step is read when the next one is under way, so that no step waits for the device; weights stay finite
    in any case.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.total = 0
        self.in_a_row = 0
        self.rewinds: Counter[int] = Counter()  # by the step gone back to
        self.pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def watch(self, result: StepResult, *, step: int) -> bool:
        """Judge the step before this one and remember this one; return whether the run is to be rewound.

        Raises:
            TrainingFailed: see `judge`.
        """
        if self.judge():
            return True
        finite, copied = result.finite.to("cpu", non_blocking=True), None
        if result.finite.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.pending = (step, finite, copied)
        return False

    def judge(self, *, last: bool = False) -> bool:
        """Judge the newest step that was watched; return whether the run is to be rewound.

        last: the run is over; its last step is left out, as there is nothing to rewind for.

        Raises:
            TrainingFailed: it was not finite, and the run is to stop for that or this is the tenth in a row.
        """
        if self.pending is None:
            return False
        (step, finite, copied), self.pending = self.pending, None
        if copied is not None:
            copied.synchronize()  # of the step before, while the next one is under way
        if bool(finite):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.total += 1
        if self.on_nonfinite is OnNonfinite.rewind:
            say(f"loss or gradient is not finite at step {step}: " + ("left out" if last else "rewinding"))
            return not last
        if self.on_nonfinite is OnNonfinite.stop or self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"loss or gradient is not finite at step {step}; the weights are still good. Lower optim.lr, set "
                "optim.max_grad_norm=1, or go on with on_nonfinite=skip_step or rewind"
            )
        return False

    def rewound_to(self, step: int) -> None:
        """Count a rewind.

        Raises:
            TrainingFailed: it is the fourth to the same checkpoint.
        """
        self.rewinds[step] += 1
        if self.rewinds[step] > MAX_REWINDS:
            raise TrainingFailed(
                f"rewound {MAX_REWINDS} times to step {step}, and a later step is still not finite: lower optim.lr or "
                "set optim.max_grad_norm=1, and give resume= an older checkpoint"
            )
