"""When each shard is needed: the order is known, so prefetching and eviction follow it and guess nothing."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from clip_train.data.order import SlotOrder


class ShardId(NamedTuple):
    """A shard of a run."""

    source: int
    shard: int


class Rows(NamedTuple):
    """The rows of every global batch that the ranks of this machine read."""

    first: int
    last: int


class Schedule:
    """When each shard is needed, from a slot on as far as it was looked ahead.

    Args:
        order: which sample stands at each slot.
        rows: of every batch that count.
        global_batch_size: slots of a batch.
        consumed: first slot of the first batch.
        gap: slots without need after which a shard need not be kept for the next one.
    """

    def __init__(self, order: SlotOrder, *, rows: Rows, global_batch_size: int, consumed: int, gap: int) -> None:
        self.planned_to = consumed
        self._order = order
        self._rows = rows
        self._global_batch_size = global_batch_size
        self._gap = gap
        self._needs: dict[ShardId, deque[list[int]]] = {}  # first and last slot of each stretch of need

    def look_ahead(self) -> None:
        """Take in one more batch."""
        for shard in self.of_batch(self.planned_to):
            stretches = self._needs.setdefault(shard, deque())
            if stretches and self.planned_to - stretches[-1][1] <= self._gap:
                stretches[-1][1] = self.planned_to
            else:
                stretches.append([self.planned_to, self.planned_to])
        self.planned_to += self._global_batch_size

    def of_batch(self, consumed: int) -> list[ShardId]:
        """Return the shards of the batch that begins at slot `consumed`."""
        slots = self._order.global_batch(consumed, global_batch_size=self._global_batch_size)
        source, shard, _ = self._order.locate(slots[self._rows.first : self._rows.last])
        return [ShardId(*pair) for pair in np.unique(np.stack([source, shard], 1), axis=0).tolist()]

    def forget(self, consumed: int) -> None:
        """Drop what was needed before the batch that begins at slot `consumed`."""
        for shard in list(self._needs):
            stretches = self._needs[shard]
            while stretches and stretches[0][1] < consumed:
                stretches.popleft()
            if not stretches:
                del self._needs[shard]

    def distances(self, consumed: int) -> dict[ShardId, int]:
        """Return the samples from slot `consumed` until each shard is needed, nearest first."""
        nearest = {shard: max(0, stretches[0][0] - consumed) for shard, stretches in self._needs.items()}
        return dict(sorted(nearest.items(), key=lambda item: item[1]))
