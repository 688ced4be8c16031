"""What a loader worker does: turn a few consecutive rows of a batch into pixels and tokens.

A row whose content cannot be used keeps its place. `substitute` shows another sample of the same shuffle window, chosen
by the order alone; `mask` marks the row as padding. Both depend on the slot and the global batch size only, so every
machine and every number of workers makes the same choice.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from clip_train.data.activity import Doing
from clip_train.data.apart import run_apart, run_bounded, run_here
from clip_train.data.audit import hash_samples
from clip_train.data.bad import BadSample
from clip_train.data.images.decode import BadSampleError, open_image
from clip_train.data.images.transforms import CAPTION_WORD, TrainTransform, sample_uniforms
from clip_train.data.reader import ShardReader
from clip_train.data.slabs import SlabRows, Slabs
from clip_train.data.tasks import Place, StoredRows, Task, TaskFailure, TaskResult, TaskRows
from clip_train.errors import ClipTrainError
from clip_train.types import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from clip_train.data.activity import Activity
    from clip_train.data.apart import Run
    from clip_train.data.captions import CaptionChooser
    from clip_train.data.features import FeatureTable
    from clip_train.data.order import SlotOrder
    from clip_train.data.source import Source


MAX_OPEN_SHARDS = 64
"""Of a worker, over all sources; two descriptors each, where some systems allow a process 256."""


class Tokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    context_length: int

    def encode_padded(self, text: str) -> tuple[NDArray[np.int64], int, bool]:
        """Return ids int64 [L], their number, and whether the text was cut."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """The sample that stands in for a bad one."""

    k: int  # its place in the list of candidates, from 1
    shard: int
    index: int


class Rows:
    """The rows of a task while they are filled.

    Args:
        batch: rows that are not valid yet; the numbers of each come from its slot.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.images, self.tokens, self.lengths, self.slots, self.valid = (t.numpy() for t in self.batch)


class RowFiller:
    """Turns the files of a sample into a row: pixels by the transform, tokens of one caption.

    Args:
        seed: seed of the run, for crops, flips and captions.
        transform: decodes, crops and augments a picture.
        captions: draws the caption of a sample.
        tokenizer: turns captions into ids.
    """

    def __init__(self, *, seed: int, transform: TrainTransform, captions: CaptionChooser, tokenizer: Tokenizer) -> None:
        self._seed = seed
        self._transform = transform
        self._captions = captions
        self._tokenizer = tokenizer
        self.features: FeatureTable | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a picture as the model gets it."""
        return 3 * self._transform.image_size**2

    def new_rows(self, slots: NDArray[np.int64]) -> Rows:
        """Return empty rows for slots."""
        size = self._transform.image_size
        if self.features is None:
            images = _shared_zeros(len(slots), size, size, 3, dtype=torch.uint8)
        else:
            images = _shared_zeros(len(slots), self.features.width, dtype=torch.float32)
        n = len(slots)
        batch = Batch(
            images=images,
            tokens=torch.zeros(n, self._tokenizer.context_length, dtype=torch.int64),
            lengths=torch.zeros(n, dtype=torch.int64),
            slots=torch.from_numpy(slots),
            valid=torch.zeros(n, dtype=torch.bool),
        )
        return Rows(batch)

    def new_slabs(self, *, workers: int, per_worker: int, rows: int) -> Slabs | None:
        """Return memory for so many rows of pictures at a time; None where there is none, and for features."""
        if not workers or self.features is not None or not Slabs.are_possible():
            return None
        return Slabs(
            workers=workers, per_worker=per_worker, rows=rows, image_size=self._transform.image_size,
            context_length=self._tokenizer.context_length,
        )  # fmt: skip

    def fill(
        self, rows: Rows, row: int, image: bytes, members: Sequence[bytes], place: Place | None = None, *,
        run: Run = run_here,
    ) -> None:  # fmt: skip
        """Fill a row; the numbers that decide crop and caption are those of its slot.

        Args:
            rows: where to.
            row: which.
            image: the encoded picture.
            members: those that hold captions.
            place: of the sample; its feature stands there if `features` is set.
            run: how the picture is decoded, see data/apart.py. Apart needs rows in shared memory, so a loader worker.

        Raises:
            BadSampleError: the content cannot be used; the row is not valid.
        """
        uniforms = sample_uniforms(self._seed, int(rows.slots[row]))
        caption = self._captions(members, uniform=uniforms[CAPTION_WORD])
        look = partial(self._look, image, uniforms=uniforms, place=place, out=rows.images[row])
        run(look)  # last of what can fail
        rows.tokens[row], rows.lengths[row], _ = self._tokenizer.encode_padded(caption)
        rows.valid[row] = True

    def _look(self, image: bytes, *, uniforms: Sequence[float], place: Place | None, out: NDArray[Any]) -> None:
        if self.features is None:
            self._transform(image, uniforms=uniforms, out=out)
            return
        assert place is not None, "features are those of indexed samples"
        feature = self.features.read(*place)
        if feature is None:
            open_image(image)  # says what is wrong with it
            raise BadSampleError("undecodable")
        out[:] = feature


class SampleDataset(Dataset[TaskResult]):
    """Reads, decodes, crops and tokenises the rows of a task.

    Args:
        sources: the indexed shards, in the order's order.
        order: which sample stands at each slot.
        global_batch_size: decides which samples may substitute for others.
        substitute: replace unusable samples where possible, else mask them.
        filler: makes rows of samples.
        activity: where this process notes what it does.
    """

    def __init__(
        self, sources: Sequence[Source], *, order: SlotOrder, global_batch_size: int, substitute: bool,
        filler: RowFiller, activity: Activity,
    ) -> None:  # fmt: skip
        self._sources = tuple(sources)
        self._sids = np.array([source.sid for source in order.sources], dtype=np.uint64)
        self._readers = [ShardReader(source, max_open=max(4, MAX_OPEN_SHARDS // len(sources))) for source in sources]
        self.order = order
        self._global_batch_size = global_batch_size
        self._substitute = substitute
        self._filler = filler
        self._activity = activity
        self._retries_counted = 0
        self.slabs: Slabs | None = None
        """Where loader processes put rows; None makes new shared memory for every task."""
        self.careful_until = 0
        """Pictures of batches that begin before this slot are decoded apart: one of them may have ended a worker."""

    def __getitem__(self, task: Task) -> TaskResult:
        """Return the rows of a task. What a worker raises travels as a value: only then is it told from a dead one."""
        try:
            return TaskResult(task.consumed, self._rows_in_slab(task) or self._rows(task))
        except ClipTrainError as error:
            return TaskResult(task.consumed, TaskFailure(error, ""))
        except Exception:
            if get_worker_info() is None:
                raise
            return TaskResult(task.consumed, TaskFailure(None, traceback.format_exc()))
        finally:
            worker, retries = worker_number(), sum(reader.retries for reader in self._readers)
            self._activity.count_retries(retries - self._retries_counted, worker=worker)
            self._retries_counted = retries
            self._activity.note(Doing.idle, worker=worker)

    def read_in_pieces(self, in_pieces: bool) -> None:
        """Say whether samples of remote shards are read by themselves until the shards are here."""
        for reader in self._readers:
            reader.in_pieces = in_pieces

    def close(self) -> None:
        """Close the shards that this process opened."""
        for reader in self._readers:
            reader.close()

    def _rows_in_slab(self, task: Task) -> StoredRows | None:
        """Return the rows of a task if there is a slab for them."""
        if self.slabs is None or get_worker_info() is None or len(task.slots) > self.slabs.rows:
            return None
        slab = self.slabs.take(worker=worker_number())
        if slab is None:
            return None
        try:
            rows = Rows(self.slabs.empty_batch(slab, slots=task.slots))
            _, id_hash, bad = self._filled(rows, task)
            rows.images[~rows.valid] = 0
            return StoredRows(SlabRows(slab, len(task.slots)), id_hash, bad)
        except BaseException:
            self.slabs.release(slab)
            raise

    def _rows(self, task: Task) -> TaskRows:
        return self._filled(self._filler.new_rows(task.slots), task)

    def _filled(self, rows: Rows, task: Task) -> TaskRows:
        bad: list[BadSample] = []
        run: Run = run_here if get_worker_info() is None else run_bounded
        if task.consumed < self.careful_until:
            run = run_apart
        sources, shards, indices = self.order.locate(task.slots)
        for row, slot in enumerate(task.slots.tolist()):
            source, shard, index = int(sources[row]), int(shards[row]), int(indices[row])
            try:
                self._fill(rows, row, Place(source, shard, index), run=run)
            except BadSampleError as error:
                found = self._fill_with_substitute(rows, row, slot, run=run) if self._substitute else None
                bad.append(self._bad_sample(slot, source, shard, index, error.reason, found.k if found else None))
                if found is not None:
                    shards[row], indices[row] = found.shard, found.index
        valid = rows.valid
        id_hash = hash_samples(self._sids[sources[valid]], shards[valid], indices[valid])
        return TaskRows(rows.batch, id_hash, bad)

    def _fill(self, rows: Rows, row: int, place: Place, *, run: Run) -> None:
        worker = worker_number()
        self._activity.note(Doing.reading, worker=worker, source=place.source, shard=place.shard)
        image, members = self._readers[place.source].read(place.shard, place.sample)
        self._activity.note(Doing.decoding, worker=worker, source=place.source, shard=place.shard)
        self._filler.fill(rows, row, image, members, place, run=run)

    def use_features(self, table: FeatureTable) -> None:
        """Read features in place of pictures. Before the first task."""
        self._filler.features = table

    def _bad_sample(self, slot: int, source: int, shard: int, index: int, reason: str, k: int | None) -> BadSample:
        key = self._readers[source].key(shard, index)
        return BadSample(
            slot, self._sources[source].name, self._sources[source].shard_name(shard), index, key, reason, k
        )

    def _fill_with_substitute(self, rows: Rows, row: int, slot: int, *, run: Run) -> Substitute | None:
        """Fill a row with the first usable substitute, which keeps the numbers of its slot; without one, leave it."""
        source, shards, indices = self.order.substitutes(slot, global_batch_size=self._global_batch_size)
        for k, (shard, index) in enumerate(zip(shards.tolist(), indices.tolist(), strict=True), start=1):
            try:
                self._fill(rows, row, Place(source, shard, index), run=run)
                return Substitute(k, shard, index)
            except BadSampleError:
                continue
        return None


def worker_number() -> int:
    """Return the number of this loader process, 0 in the trainer."""
    worker = get_worker_info()
    return 0 if worker is None else worker.id


def _shared_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros; in a worker in shared memory, so that the trainer receives them without a copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * dtype.itemsize)
    # New shared memory is zero-filled by the system.
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
