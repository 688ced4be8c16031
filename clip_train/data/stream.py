"""What the trainer needs of a stream of training batches, whichever reader it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clip_train.data.bad import BadSample
    from clip_train.data.loader import StepReport
    from clip_train.types import Batch


class BatchStream(Protocol):
    """The endless stream of training batches of one rank."""

    num_samples: int
    """Samples of an epoch."""

    def batches(self, consumed: int) -> Iterator[Batch]:
        """Yield this rank's rows of the global batches from slot `consumed` on, without end. Every rank calls it."""

    def take_report(self) -> StepReport:
        """Return what the oldest batch that was yielded and not yet asked about consists of."""

    def count(self, bad: Sequence[BadSample]) -> None:
        """Count the bad samples of all ranks in one step."""

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what a resume compares and where it begins, alike on all ranks, which must all call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""

    def counters(self) -> dict[str, int]:
        """Return how many samples of all ranks could not be used, by reason."""

    def close(self) -> None:
        """Stop the workers and close the shards."""
