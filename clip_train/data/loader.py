"""Deliver this rank's rows of every global batch, from any point of the sample stream.

1. The order names the slots of a global batch; this rank takes its piece of the sorted rows and cuts it into tasks
   (data/tasks.py).
2. Each loader process puts the rows of a task into memory that it shares with the trainer (data/slabs.py).
3. Workers fill uint8 rows and tokens (data/dataset.py); torch's DataLoader hands the tasks back in order.
4. `TrainStream` joins the tasks of a step and checks that they belong to it. A worker that fails is replaced, at the
   very step.
5. With each batch goes a `StepReport`; what all ranks report of a step is counted alike on each (data/delivery.py).

The position of the stream is one integer, `consumed`. Nothing else must be saved to continue, at any number of ranks.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from clip_train.data.dataset import SampleDataset
from clip_train.data.order import ORDER_VERSION, SlotOrder, SourceOrder
from clip_train.data.remote.spool import Spool, check_room, ranks_here
from clip_train.data.segments import Segment, SegmentSource, continued, differences, moved
from clip_train.data.stream import BatchStream
from clip_train.data.tasks import MAX_TASK_ROWS, TaskSampler, join, report_of, rows_of
from clip_train.data.workers import (
    BATCHES_UNDER_WAY,
    WorkerFailed,
    WorkerTasks,
    open_loader,
    require_shared_memory,
    start_worker_server,
    tasks_ahead,
)
from clip_train.errors import IntegrityError, UserError
from clip_train.redact import unsigned
from clip_train.types import Batch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from clip_train.data.dataset import RowFiller
    from clip_train.data.features import FeatureTable
    from clip_train.data.slabs import Slabs
    from clip_train.data.source import Source
    from clip_train.distributed.world import World

logger = logging.getLogger(__name__)

SLABS_IN_TRAINER = 3  # of a worker at most, before it makes new memory: rows under way to the device, in use, forgotten


class TrainStream(BatchStream):
    """The endless stream of training batches of one rank.

    Args:
        sources: the indexed shards, one source or a mixture.
        weights: share of each source; proportional to their sizes if None.
        world: which rows are this rank's.
        seed: seed of the order and of every crop.
        global_batch_size: samples of a step over all ranks.
        filler: makes rows of samples.
        workers: loader processes of this rank; 0 loads in the trainer's process.
        lanes, window: see data/order.py.
        substitute: replace unusable samples where possible, else mask them.
        max_bad_fraction: of the last 10,000 samples of all ranks; more stops the run.
        drop_last: end an epoch with its last whole batch; needs one source.
        new_segment: where the data differ from a checkpoint's, begin a new segment instead of refusing to continue.

    Raises:
        UserError: there are fewer samples than a global batch holds, or too little shared memory for the workers.
    """

    def __init__(
        self, sources: Sequence[Source], *, world: World, seed: int, global_batch_size: int, filler: RowFiller,
        workers: int, lanes: int, window: int, substitute: bool,
        max_bad_fraction: float, weights: Sequence[float] | None = None, drop_last: bool = False,
        new_segment: bool = False,
    ) -> None:  # fmt: skip
        assert global_batch_size % world.size == 0 and (not drop_last or len(sources) == 1)
        samples = sum(source.num_samples for source in sources)
        if samples < global_batch_size:
            raise UserError(
                f"global_batch_size={global_batch_size} must not exceed the {samples} samples of data.train"
            )
        if empty := [source.name for source in sources if not source.num_samples]:
            raise UserError(f"data.train: there is no sample in the shards of {', '.join(empty)}")
        super().__init__(
            num_samples=samples - samples % global_batch_size if drop_last else samples,
            global_batch_size=global_batch_size, max_bad_fraction=max_bad_fraction, workers=workers,
        )  # fmt: skip
        self.sources = tuple(sources)
        self._weights = weights
        self._world = world
        self._seed = seed
        self._lanes, self._window = lanes, window
        self._drop_last, self._new_segment = drop_last, new_segment
        self._source_orders = [
            SourceOrder(
                s.counts, name=s.name, seed=seed, lanes=lanes, window=window,
                epoch_samples=self.num_samples if drop_last else None,
            )
            for s in sources
        ]  # fmt: skip
        self.order = self._slot_order(Segment(start=0, sources=()), number=0)
        self._segments = [self._as_segment(self.order)]
        self._warn_of_duplicates_in_a_batch()
        self._dataset = SampleDataset(
            sources, order=self.order, global_batch_size=global_batch_size, substitute=substitute, filler=filler,
            activity=self._activity,
        )  # fmt: skip
        self._filler = filler
        self._spool: Spool | None = None
        check_room(sources, lanes=lanes, window=window, world=world)
        if workers:
            rows_here = global_batch_size * ranks_here(world) // world.size
            require_shared_memory(BATCHES_UNDER_WAY * rows_here * filler.row_bytes)
            start_worker_server()  # its imports take seconds, in which the caller can build the model

    def batches(self, consumed: int) -> Iterator[Batch]:
        """Yield this rank's rows of the global batches from slot `consumed` on, without end.

        Nothing before `consumed` is read or decoded. One iterator is alive at a time: a new one ends the former. With
        remote shards every rank must call it, and it may wait for those of the first batch.

        Raises:
            IntegrityError: data is damaged or does not arrive, or too many samples cannot be used.
            UserError: a remote shard is absent or forbidden.
        """
        self.close()
        self._reports.clear()
        if self._workers and any(source.cache is not None for source in self.sources):
            self._spool = Spool(
                self.sources, order=self.order, world=self._world, global_batch_size=self._global_batch_size,
                ahead=2 * min(self._lanes * self._window, self.num_samples),
            )  # fmt: skip
            self._dataset.read_in_pieces(self._spool.start(consumed))
        self._batches = self._generate(consumed)
        return self._batches

    def _generate(self, consumed: int) -> Generator[Batch, None, None]:
        while True:  # once, and again after each failure of a worker
            sampler = TaskSampler(
                self.order, world=self._world, global_batch_size=self._global_batch_size, start=consumed
            )
            slabs = self._dataset.slabs = self._new_slabs(tasks_per_batch=sampler.tasks_per_batch)
            loader = open_loader(
                self._dataset, sampler=sampler, workers=self._workers, tasks_per_batch=sampler.tasks_per_batch
            )
            try:
                with WorkerTasks(loader, activity=self._activity) as tasks:
                    while True:
                        results = [tasks.next() for _ in range(sampler.tasks_per_batch)]
                        parts = [rows_of(result, consumed=consumed, slabs=slabs) for result in results]
                        self._reports.append(report_of(parts, consumed=consumed))
                        yield join(parts, world=self._world)
                        consumed += self._global_batch_size
                        if self._spool is not None:
                            self._spool.advance(consumed)
            except WorkerFailed as failure:
                self._failures.judge(failure, step=consumed // self._global_batch_size, where=f"at sample {consumed:,}")
                # Whatever ended the worker is among the batches under way.
                self._dataset.careful_until = consumed + BATCHES_UNDER_WAY * self._global_batch_size

    def _new_slabs(self, *, tasks_per_batch: int) -> Slabs | None:
        """Return memory that no worker of before knows: what one of those was filling stays in use for ever."""
        if not self._workers:
            return None
        ahead = tasks_ahead(workers=self._workers, tasks_per_batch=tasks_per_batch)
        rows = min(MAX_TASK_ROWS, self._global_batch_size // self._world.size)
        return self._filler.new_slabs(workers=self._workers, per_worker=ahead + SLABS_IN_TRAINER, rows=rows)

    def sample_names(self, slots: NDArray[np.int64]) -> list[str]:
        """Return shard and number of the samples at `slots`; where one was bad, another stood in for it."""
        places = zip(*(column.tolist() for column in self.order.locate(slots)), strict=True)
        return [f"({self.shard_name(source, shard)}, sample {index})" for source, shard, index in places]

    def shard_name(self, source: int, shard: int) -> str:
        """Return the name of a shard below its source."""
        return self.sources[source].shard_name(shard)

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what identifies the stream and its place, alike on all ranks: all a resume has to compare."""
        return {
            "order": ORDER_VERSION,
            "seed": self._seed,
            "L": self._lanes,
            "window": self._window,
            "consumed": consumed,
            "segments": [segment.state_dict() for segment in self._segments],
            "bad": self.counters(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called: take over segments and counts. Before the first batch.

        Raises:
            IntegrityError: the samples or their order differ, and no new segment was asked for.
        """
        segments = [Segment.from_state(row) for row in state["segments"]]
        changed = self._changes(state, segments[-1])
        if changed and not self._new_segment:
            raise IntegrityError(
                f"data.train changed since the checkpoint: {'; '.join(changed)}. Continuing would repeat and lose "
                "samples: restore the shards, or go on with the new ones by data.on_change=new_segment"
            )
        if changed:
            segments.append(continued(segments, self._segments[0], consumed=state["consumed"], seed=self._seed))
            logger.warning("new data from sample %s on: %s", f"{state['consumed']:,}", "; ".join(changed))
        else:
            segments[-1] = moved(segments[-1], self._segments[0])
        self._segments = segments
        self.order = self._dataset.order = self._slot_order(segments[-1], number=len(segments) - 1)
        self._bad.restore(state["bad"])

    def _changes(self, state: dict[str, Any], segment: Segment) -> list[str]:
        """Return how the sources differ from a saved segment.

        Raises:
            IntegrityError: more than the sources differ.
        """
        own = self.state_dict(0)
        for field in ("order", "seed", "L", "window"):
            if state[field] != own[field]:
                name = {"L": "lanes"}.get(field, field)
                raise IntegrityError(f"the checkpoint's data order has {name}={state[field]}, this run {own[field]}")
        if self._drop_last and (state["consumed"] - segment.start) % self._global_batch_size:
            raise IntegrityError(
                f"data.epoch_end=drop_last: {state['consumed'] - segment.start} samples are no whole batches of "
                f"global_batch_size={self._global_batch_size}, which may not change"
            )
        return differences(segment, self._segments[0])

    def use_features(self, table: FeatureTable) -> None:
        """Deliver features [B, D] in place of pictures. Before the first batch."""
        self._dataset.use_features(table)

    def close(self) -> None:
        """Stop the workers and close the shards."""
        super().close()
        if self._spool is not None:
            self._spool.close()
            self._spool = None
        self._dataset.close()

    def _slot_order(self, segment: Segment, *, number: int) -> SlotOrder:
        return SlotOrder(
            self._source_orders, weights=self._weights, seed=self._seed, start=segment.start,
            bases=segment.bases or None, segment=number,
        )  # fmt: skip

    def _as_segment(self, order: SlotOrder) -> Segment:
        rows = zip(self.sources, order.sources, order.quotas, order.bases.tolist(), strict=True)
        return Segment(
            start=order.start,
            sources=tuple(
                SegmentSource(
                    name=s.name, sid=o.sid, quota=quota, base=base, epoch_samples=o.epoch_samples,
                    fingerprint=s.fingerprint, shards=[unsigned(pattern) for pattern in s.patterns],
                )
                for s, o, quota, base in rows
            ),
        )  # fmt: skip

    def _warn_of_duplicates_in_a_batch(self) -> None:
        total = sum(self.order.quotas)
        for source, quota in zip(self.order.sources, self.order.quotas, strict=True):
            share = self._global_batch_size * quota / total
            if share > source.num_samples:
                logger.warning(
                    "data.train: source %r has %d samples but %d rows of each batch: its samples repeat within a batch",
                    source.name, source.num_samples, round(share),
                )  # fmt: skip


def check_divisible(global_batch_size: int, *, world: World) -> None:
    """Check that every rank gets the same number of rows.

    Raises:
        UserError: naming the nearest batch sizes that work.
    """
    if global_batch_size < 1:
        raise UserError(f"global_batch_size={global_batch_size} must be positive")
    rest = global_batch_size % world.size
    if rest:
        lower, upper = global_batch_size - rest, global_batch_size - rest + world.size
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"global_batch_size={global_batch_size} must be a multiple of the {world.size} processes: nearest {nearest}"
        )
