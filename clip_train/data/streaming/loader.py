"""The stream of training batches over shards that are read as streams (data/streaming/pipeline.py).

It has the interface of `TrainStream`. Its state is a place in the sequence of shards, the first at which any worker of
any rank has samples left; a resume, at any number of ranks, begins there.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from clip_train.data.stream import BatchStream
from clip_train.data.streaming.pipeline import SHUFFLE_BUFFER, Place, StreamedTask, StreamingDataset, Team
from clip_train.data.tasks import MAX_TASK_ROWS, join, report_of, rows_of
from clip_train.data.workers import WorkerFailed, WorkerTasks, open_loader, start_worker_server
from clip_train.distributed.collectives import gather_objects
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from clip_train.data.dataset import RowFiller
    from clip_train.distributed.world import World
    from clip_train.types import Batch

READER = "streaming"


class StreamingTrainStream(BatchStream):
    """The endless stream of training batches of one rank, in an order that depends on ranks and workers.

    Args:
        urls: the shards.
        num_samples: what the user says an epoch holds.
        captions: extensions of the members that hold captions.
        filler: makes rows of samples.
        world: which rows are this rank's.
        seed: seed of the shuffles and of every crop.
        global_batch_size: samples of a step over all ranks.
        workers: loader processes of this rank; 0 loads in the trainer's process.
        max_bad_fraction: of the last 10,000 samples of all ranks; more stops the run.

    Raises:
        UserError: there are fewer shards than workers of all ranks, or fewer samples than a batch holds.
    """

    def __init__(
        self, urls: Sequence[str], *, num_samples: int, captions: tuple[str, ...], filler: RowFiller, world: World,
        seed: int, global_batch_size: int, workers: int, max_bad_fraction: float,
    ) -> None:  # fmt: skip
        assert global_batch_size % world.size == 0
        readers = world.size * max(1, workers)
        if len(urls) < readers:
            raise UserError(
                f"data.reader=streaming needs a shard for every worker: {len(urls)} shards for {world.size} ranks with "
                f"data.workers={workers}"
            )
        if num_samples < global_batch_size:
            raise UserError(f"global_batch_size={global_batch_size} must not exceed data.num_samples={num_samples}")
        super().__init__(
            num_samples=num_samples, global_batch_size=global_batch_size, max_bad_fraction=max_bad_fraction,
            workers=workers,
        )  # fmt: skip
        self._urls = tuple(urls)
        self._captions = captions
        self._filler = filler
        self._world = world
        self._seed = seed
        self._place = Place(0, 0)  # of what has been trained on
        self._delivered: deque[tuple[int, Place]] = deque()  # slot after each batch, and this rank's place there
        if world.is_main:
            print(
                f"data.reader=streaming: {len(urls):,} shards. The order of samples depends on the number of ranks "
                f"and workers, shuffling reaches {SHUFFLE_BUFFER:,} samples, and continuing begins with the first "
                "shard that is not finished: what was read of the shards under way is seen again",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        if workers:
            start_worker_server()

    def batches(self, consumed: int) -> Iterator[Batch]:
        """Yield this rank's rows of the global batches from slot `consumed` on, without end.

        Raises:
            IntegrityError: a shard cannot be read, or too many samples or all of them cannot be used.
            UserError: a shard is absent or forbidden.
        """
        self.close()
        self._reports.clear()
        self._delivered.clear()
        self._batches = self._generate(consumed)
        return self._batches

    def shard_name(self, source: int, shard: int) -> str:
        """Return the URL of a shard; there is one source."""
        return self._urls[shard]

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return where a resume begins, alike on all ranks, which must all call it."""
        while self._delivered and self._delivered[0][0] <= consumed:
            self._place = self._delivered.popleft()[1]
        place = min(gather_objects(self._place, world=self._world, group=self._world.host_group))
        return {
            **self._identity(),
            "consumed": consumed,
            "epoch": place.epoch,
            "floor": place.floor,
            "bad": self.counters(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the place of a saved state. Before the first batch.

        Raises:
            IntegrityError: the shards or their order differ.
        """
        for field, value in self._identity().items():
            if state.get(field) != value:
                raise IntegrityError(f"the checkpoint's data has {field}={state.get(field)}, this run {value}")
        self._place = Place(state["epoch"], state["floor"])
        self._bad.restore(state["bad"])

    def _identity(self) -> dict[str, Any]:
        shards = hashlib.sha256("\n".join(self._urls).encode(errors="surrogateescape")).hexdigest()
        return {"reader": READER, "seed": self._seed, "shards": shards}

    def _generate(self, consumed: int) -> Generator[Batch, None, None]:
        rows = self._global_batch_size // self._world.size
        task_rows = [min(MAX_TASK_ROWS, rows - start) for start in range(0, rows, MAX_TASK_ROWS)]
        place = self._place
        while True:  # once, and again after each failure of a worker
            unfinished = [place] * max(1, self._workers)
            dataset = StreamingDataset(
                self._urls, captions=self._captions, filler=self._filler, team=Team(self._world.rank, self._world.size),
                seed=self._seed, start=place, consumed=consumed, global_batch_size=self._global_batch_size,
                task_rows=task_rows, activity=self._activity,
            )  # fmt: skip
            loader = open_loader(dataset, workers=self._workers, tasks_per_batch=len(task_rows))
            number = 0
            try:
                with WorkerTasks(loader, activity=self._activity) as tasks:
                    while True:
                        parts = []
                        for _ in task_rows:
                            task: StreamedTask = tasks.next()
                            parts.append(rows_of(task.result, consumed=consumed))
                            unfinished[number % len(unfinished)] = task.unfinished
                            number += 1
                        place = min(unfinished)
                        self._reports.append(report_of(parts, consumed=consumed))
                        consumed += self._global_batch_size
                        self._delivered.append((consumed, place))
                        yield join(parts, world=self._world)
            except WorkerFailed as failure:
                self._failures.judge(failure, step=consumed // self._global_batch_size, where=f"at sample {consumed:,}")
