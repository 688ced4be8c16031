"""Deliver this rank's rows of every global batch, from any point of the sample stream.

1. The order names the slots of a global batch; this rank takes its piece of the sorted rows (`_TaskSampler`).
2. The piece is cut into tasks of at most 256 rows, so that all workers build one large batch together.
3. Workers fill uint8 rows and tokens (data/dataset.py); torch's DataLoader hands the tasks back in order.
4. `TrainStream` joins the tasks of a step, checks that they belong to it, and counts unusable samples.

The position of the stream is one integer, `consumed`. Nothing else must be saved to continue, at any number of ranks.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler

from clip_train.data.dataset import BadSample, SampleDataset, Task, TaskResult, Tokenizer
from clip_train.data.order import ORDER_VERSION, SlotOrder, SourceOrder
from clip_train.data.workers import WORKER_START_METHOD, as_is, start_worker, start_worker_server
from clip_train.errors import IntegrityError, UserError
from clip_train.types import Batch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from torch import Tensor

    from clip_train.data.captions import CaptionChooser
    from clip_train.data.source import Source
    from clip_train.data.transforms import TrainTransform
    from clip_train.distributed.world import World

logger = logging.getLogger(__name__)

MAX_TASK_ROWS = 256
BAD_WINDOW = 10_000  # samples over which the bad fraction is taken
MAX_BAD_IN_A_ROW = 100
_TIMEOUT_SECONDS = 600.0
_SHOWN_BAD = 20


class TrainStream:
    """The endless stream of training batches of one rank.

    Args:
        sources: the indexed shards, one source or a mixture.
        weights: share of each source; proportional to their sizes if None.
        world: which rows are this rank's.
        seed: seed of the order and of every crop.
        global_batch_size: samples of a step over all ranks.
        tokenizer: turns captions into ids.
        captions: draws the caption of a sample.
        transform: decodes, crops and augments a picture.
        workers: loader processes of this rank; 0 loads in the trainer's process.
        lanes, window: see data/order.py.
        substitute: replace unusable samples where possible, else mask them.
        max_bad_fraction: of the last 10,000 samples of this rank; more stops the run.

    Raises:
        UserError: there are fewer samples than a global batch holds.
    """

    def __init__(
        self, sources: Sequence[Source], *, world: World, seed: int, global_batch_size: int, tokenizer: Tokenizer,
        captions: CaptionChooser, transform: TrainTransform, workers: int, lanes: int, window: int, substitute: bool,
        max_bad_fraction: float, weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        assert global_batch_size % world.size == 0
        self.num_samples = sum(source.num_samples for source in sources)
        if self.num_samples < global_batch_size:
            raise UserError(
                f"global_batch_size={global_batch_size} must not exceed the {self.num_samples} samples of data.train"
            )
        self._sources = tuple(sources)
        self._world = world
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._workers = workers
        self._lanes, self._window = lanes, window
        self._order = SlotOrder(
            [SourceOrder(s.counts, name=s.name, seed=seed, lanes=lanes, window=window) for s in sources],
            weights=weights,
            seed=seed,
        )
        self._warn_of_duplicates_in_a_batch()
        self._dataset = SampleDataset(
            sources, order=self._order, seed=seed, global_batch_size=global_batch_size, substitute=substitute,
            transform=transform, captions=captions, tokenizer=tokenizer,
        )  # fmt: skip
        self._bad = _BadSamples(max_bad_fraction)
        self._batches: Generator[Batch, None, None] | None = None
        if workers:
            start_worker_server()  # its imports take seconds, in which the caller can build the model

    def batches(self, consumed: int) -> Iterator[Batch]:
        """Yield this rank's rows of the global batches from slot `consumed` on, without end.

        Nothing before `consumed` is read or decoded. One iterator is alive at a time: a new one ends the former.

        Raises:
            IntegrityError: data is damaged, or too many samples cannot be used.
        """
        self.close()
        self._batches = self._generate(consumed)
        return self._batches

    def _generate(self, consumed: int) -> Generator[Batch, None, None]:
        sampler = _TaskSampler(
            self._order, world=self._world, global_batch_size=self._global_batch_size, start=consumed
        )
        tasks = iter(self._loader(sampler))
        try:
            while True:
                parts = [self._checked(next(tasks), consumed=consumed) for _ in range(sampler.tasks_per_batch)]
                yield self._join(parts)
                consumed += self._global_batch_size
        finally:
            del tasks  # it owns the workers, which must end now and not when some traceback is forgotten

    def _checked(self, result: TaskResult, *, consumed: int) -> Batch:
        if result.error is not None:
            raise result.error
        assert result.rows is not None and result.consumed == consumed, "the loader lost its place"
        self._bad.add(result.bad, slots=result.rows.slots)
        return result.rows

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what identifies the stream and its place: all a resume has to compare. `bad` counts this rank's."""
        return {
            "order": ORDER_VERSION,
            "seed": self._seed,
            "L": self._lanes,
            "window": self._window,
            "consumed": consumed,
            "segments": [{"start": self._order.start, "sources": self._source_states()}],
            "bad": self.counters(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Compare a saved state with this stream.

        Raises:
            IntegrityError: the samples or their order differ, so the run cannot be continued.
        """
        own = self.state_dict(0)
        for field in ("order", "seed", "L", "window"):
            if state[field] != own[field]:
                name = {"L": "lanes"}.get(field, field)
                raise IntegrityError(f"the checkpoint's data order has {name}={state[field]}, this run {own[field]}")
        saved = {row["name"]: row for row in state["segments"][-1]["sources"]}
        current = {row["name"]: row for row in self._source_states()}
        if saved.keys() != current.keys():
            raise IntegrityError(f"the checkpoint's data sources are {list(saved)}, this run's {list(current)}")
        for name, row in current.items():
            for field in ("fingerprint", "quota"):
                if saved[name][field] != row[field]:
                    raise IntegrityError(
                        f"data source {name!r} changed since the checkpoint ({field} {saved[name][field]} -> "
                        f"{row[field]}): continuing would repeat and lose samples. Restore the shards or start anew"
                    )

    def counters(self) -> dict[str, int]:
        """Return how many samples of this rank could not be used, by reason."""
        return dict(sorted(self._bad.by_reason.items()))

    def close(self) -> None:
        """Stop the workers and close the shards."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._dataset.close()

    def _loader(self, sampler: _TaskSampler) -> DataLoader:
        if not self._workers:
            return DataLoader(self._dataset, sampler=sampler, batch_size=None, collate_fn=as_is)
        return DataLoader(
            self._dataset, sampler=sampler, batch_size=None, collate_fn=as_is, num_workers=self._workers,
            prefetch_factor=max(2, -(-2 * sampler.tasks_per_batch // self._workers)), worker_init_fn=start_worker,
            multiprocessing_context=WORKER_START_METHOD, timeout=_TIMEOUT_SECONDS, in_order=True,
        )  # fmt: skip

    def _join(self, parts: list[Batch]) -> Batch:
        """Put the tasks of a step together, in pinned memory if they go to a GPU."""
        pin = self._world.device.type == "cuda"
        if len(parts) == 1 and not pin:
            return parts[0]
        return Batch(*(_concatenate(tensors, pin=pin) for tensors in zip(*parts, strict=True)))

    def _source_states(self) -> list[dict[str, Any]]:
        return [
            {"name": s.name, "sid": o.sid, "quota": quota, "base": int(base), "fingerprint": s.fingerprint}
            for s, o, quota, base in zip(
                self._sources, self._order.sources, self._order.quotas, self._order.bases, strict=True
            )
        ]

    def _warn_of_duplicates_in_a_batch(self) -> None:
        total = sum(self._order.quotas)
        for source, quota in zip(self._order.sources, self._order.quotas, strict=True):
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


class _TaskSampler(Sampler[Task]):
    """Yields the tasks of this rank, batch after batch."""

    def __init__(self, order: SlotOrder, *, world: World, global_batch_size: int, start: int) -> None:
        rows = global_batch_size // world.size
        self._order = order
        self._global_batch_size = global_batch_size
        self._start = start
        self._first, self._last = world.rank * rows, (world.rank + 1) * rows
        self.tasks_per_batch = -(-rows // MAX_TASK_ROWS)

    def __iter__(self) -> Iterator[Task]:
        consumed = self._start
        while True:
            rows = self._order.global_batch(consumed, global_batch_size=self._global_batch_size)
            own = rows[self._first : self._last]
            for start in range(0, len(own), MAX_TASK_ROWS):
                yield Task(consumed, own[start : start + MAX_TASK_ROWS])
            consumed += self._global_batch_size


class _BadSamples:
    """Counts unusable samples and stops the run where they are too many."""

    def __init__(self, max_fraction: float) -> None:
        self.by_reason: Counter[str] = Counter()
        self._max_fraction = max_fraction
        self._recent: deque[tuple[int, int]] = deque()  # rows and bad rows per task, over the last 10,000 rows
        self._in_a_row = 0
        self._first: list[BadSample] = []

    def add(self, bad: list[BadSample], *, slots: Tensor) -> None:
        """Count the bad samples of a task whose rows are `slots`.

        Raises:
            IntegrityError: more than the allowed fraction of the last 10,000, or 100 in a row, are bad.
        """
        self._recent.append((len(slots), len(bad)))
        while sum(rows for rows, _ in self._recent) - self._recent[0][0] >= BAD_WINDOW:
            self._recent.popleft()
        if not bad:
            self._in_a_row = 0
            return
        self.by_reason.update(sample.reason for sample in bad)
        self._first += bad[: _SHOWN_BAD - len(self._first)]
        bad_slots = {sample.slot for sample in bad}
        for slot in slots.tolist():
            self._in_a_row = self._in_a_row + 1 if slot in bad_slots else 0
            if self._in_a_row >= MAX_BAD_IN_A_ROW:
                raise self._too_many(f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used")
        recent = sum(count for _, count in self._recent)
        if recent > self._max_fraction * BAD_WINDOW:
            seen = sum(rows for rows, _ in self._recent)
            raise self._too_many(
                f"{recent} of the last {seen} samples cannot be used, more than data.max_bad_fraction="
                f"{self._max_fraction} of {BAD_WINDOW}"
            )

    def _too_many(self, what: str) -> IntegrityError:
        listed = "; ".join(f"{sample.key}: {sample.reason}" for sample in self._first)
        return IntegrityError(f"{what}. The first: {listed}")


def _concatenate(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    first = tensors[0]
    rows = sum(len(t) for t in tensors)
    out = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, pin_memory=pin)
    return torch.cat(list(tensors), out=out)
