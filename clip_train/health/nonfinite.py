"""Decide what becomes of a run whose loss or gradient is not finite. The step itself never makes such an update."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from clip_train.errors import TrainingFailed
from clip_train.schema import OnNonfinite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from clip_train.step import StepResult

MAX_SKIPPED_IN_A_ROW = 10
MAX_REWINDS = 3  # to one checkpoint


class _Watched(NamedTuple):
    """A step that is not judged yet."""

    step: int
    result: StepResult
    slots: Tensor  # [B] of this rank's rows
    finite: Tensor  # [] on the host, once `copied`
    copied: torch.cuda.Event | None


class NonfiniteSteps:
    """Watches for updates that were not made because something was not finite. Alike on all ranks.

    The flag of a step is read when the next one is under way, so that no step waits for the device; weights stay finite
    in any case.

    Args:
        on_nonfinite: what becomes of the run.
        found: told the step, its result and its slots when it was not finite; every rank calls it, and it returns what
            was not finite, for the message.
    """

    def __init__(self, on_nonfinite: OnNonfinite, *, found: Callable[[int, StepResult, Tensor], str]) -> None:
        self.on_nonfinite = on_nonfinite
        self.found = found
        self.total = 0
        self.in_a_row = 0
        self.rewinds: Counter[int] = Counter()  # by the step gone back to
        self.pending: _Watched | None = None

    def watch(self, result: StepResult, *, slots: Tensor, step: int) -> bool:
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
        self.pending = _Watched(step, result, slots, finite, copied)
        return False

    def judge(self, *, last: bool = False) -> bool:
        """Judge the newest step that was watched; return whether the run is to be rewound.

        last: the run is over; its last step is left out, as there is nothing to rewind for.

        Raises:
            TrainingFailed: it was not finite, and the run is to stop for that or this is the tenth in a row.
        """
        if self.pending is None:
            return False
        watched, self.pending = self.pending, None
        if watched.copied is not None:
            watched.copied.synchronize()  # of the step before, while the next one is under way
        if bool(watched.finite):
            self.in_a_row = 0
            return False
        step = watched.step
        self.in_a_row += 1
        self.total += 1
        what = self.found(step, watched.result, watched.slots)
        if self.on_nonfinite is OnNonfinite.rewind:
            return not last
        if self.on_nonfinite is OnNonfinite.stop or self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"{what}. The weights are still good: lower optim.lr, set optim.max_grad_norm=1, or go on with "
                "on_nonfinite=skip_step or rewind"
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
