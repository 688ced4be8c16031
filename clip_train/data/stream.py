"""What the trainer needs of a stream of training batches, whichever reader it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_train.data.activity import Activity
from clip_train.data.bad import BadSamples
from clip_train.data.workers import WorkerFailures

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from clip_train.data.bad import BadSample
    from clip_train.types import Batch


class StepReport(NamedTuple):
    """What one rank's batch consists of."""

    consumed: int  # first slot of the global batch
    id_hash: int  # of the samples shown, see data/audit.py
    bad: list[BadSample]


class BatchStream(ABC):
    """The endless stream of training batches of one rank. One iterator is alive at a time.

    Attributes:
        num_samples: samples of an epoch.
    """

    def __init__(self, *, num_samples: int, global_batch_size: int, max_bad_fraction: float, workers: int) -> None:
        self.num_samples = num_samples
        self._global_batch_size = global_batch_size
        self._workers = workers
        self._activity = Activity(workers)
        self._failures = WorkerFailures()
        self._bad = BadSamples(max_bad_fraction)
        self._reports: deque[StepReport] = deque()
        self._batches: Generator[Batch, None, None] | None = None

    @abstractmethod
    def batches(self, consumed: int) -> Iterator[Batch]:
        """Yield this rank's rows of the global batches from slot `consumed` on, without end. Every rank calls it.

        A new iterator ends the former.
        """

    @abstractmethod
    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what a resume compares and where it begins, alike on all ranks, which must all call it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called. Before the first batch."""

    @abstractmethod
    def shard_name(self, source: int, shard: int) -> str:
        """Return the name of a shard, for messages."""

    def sample_names(self, slots: NDArray[np.int64]) -> list[str]:
        """Return which samples stand at `slots`, for messages; empty names where that cannot be known any more."""
        return [""] * len(slots)

    def describe_loader(self) -> str:
        """Return what the loader of this rank is doing now, such as `4 of 4 workers reading 00012.tar for 61 s`."""
        return self._activity.describe(self.shard_name)

    @property
    def loader_rebuilds(self) -> int:
        """How often workers of this rank were replaced in this process."""
        return self._failures.total

    @property
    def transport_retries(self) -> int:
        """How often loader processes of this rank had to try a read again, in this process."""
        return self._activity.retries

    def take_report(self) -> StepReport:
        """Return what the oldest batch that was yielded and not yet asked about consists of."""
        return self._reports.popleft()

    def count(self, bad: Sequence[BadSample]) -> None:
        """Count the bad samples of all ranks in one step. Every rank calls it with the same.

        Raises:
            IntegrityError: there are too many of them.
        """
        self._bad.add(bad, num_samples=self._global_batch_size)

    def counters(self) -> dict[str, int]:
        """Return how many samples of all ranks could not be used, by reason, restarts included."""
        return dict(sorted(self._bad.by_reason.items()))

    def close(self) -> None:
        """Stop the workers and close the shards."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
