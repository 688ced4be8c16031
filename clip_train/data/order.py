"""Slot order v1: which sample stands at each place of the endless training sequence.

A slot `g` names the same sample on every machine, at any number of ranks and workers. Every function here is a pure
function of the seed, the sample counts and the slot; nothing has state that must be saved. Positions and slots are
int64 and hashes uint64 throughout, since runs go past 2^40 slots.

1. A mixture deals each slot to a source and a position in it (`SlotOrder`).
2. A source cuts each epoch into lanes of consecutive samples; a lane is shuffled window by window (`SourceOrder`).
3. The epoch's shard permutation turns the place into a shard and an index in it.

The golden vectors in tests/data/test_order.py fix every number: a change of any of them is a new order version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]
    UInt64s = NDArray[np.uint64]

ORDER_VERSION = "v1"
MIXTURE_BLOCK = 4096
MAX_SUBSTITUTES = 8
SHARD, WINDOW, MIX = 1, 2, 3

_MASK = 2**64 - 1
_Value = TypeVar("_Value")


def mix64(values: UInt64s) -> UInt64s:
    """Hash uint64 values to uint64 by a bijection (splitmix64, Steele et al. 2014)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix64_int(x: int) -> int:
    """Return `mix64` of one integer, modulo 2^64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*words: int) -> int:
    """Hash a tuple of integers in [0, 2^64) to one."""
    k = 0
    for word in words:
        k = mix64_int(k ^ word)
    return k


def permutation(n: int, k: int) -> NDArray[np.intp]:
    """Return the permutation of 0..n-1 that key `k` names. The hash is a bijection, so the sort has no ties."""
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) ^ np.uint64(k)))


def source_id(name: str) -> int:
    """Return the number that stands for a source in every hash, so that another source never changes its order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


class Places(NamedTuple):
    """Where positions of one source lie before the shuffles. Every field is int64 [n]."""

    epoch: Int64s
    lane: Int64s
    window: Int64s
    start: Int64s  # first place of the window in the epoch
    size: Int64s  # samples in the window
    offset: Int64s  # place in the window


class SourceOrder:
    """The order of one source: an exact permutation of its samples in every epoch.

    Args:
        counts: samples per shard, in shard order.
        name: name of the source, part of every hash.
        seed: seed of the run.
        lanes: sequences that are read side by side.
        window: samples of a lane that are shuffled together.
        epoch_samples: length of an epoch; fewer than all samples leave out a rest, in each epoch another one.
    """

    def __init__(
        self, counts: Sequence[int], *, name: str, seed: int, lanes: int = 64, window: int = 32768,
        epoch_samples: int | None = None,
    ) -> None:  # fmt: skip
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.epoch_samples = self.num_samples if epoch_samples is None else epoch_samples
        self.name = name
        self.sid = source_id(name)
        self.lanes = min(lanes, self.num_samples)
        self.window = window
        self._seed = seed
        self._windows_per_lane = -(-self.num_samples // self.lanes) // window + 2
        # Every lane has one open window, and a batch may straddle two.
        self._tables: _Recent[NDArray[np.uint32]] = _Recent(2 * self.lanes + 2)
        self._epochs: _Recent[tuple[NDArray[np.intp], Int64s]] = _Recent(2)

    def lane_of(self, positions: Int64s) -> Int64s:
        """Return the lane of each position."""
        return positions % self.epoch_samples % self.lanes

    def places(self, positions: Int64s) -> Places:
        """Cut positions into epoch, lane, window and offset."""
        epoch, place = np.divmod(positions, self.epoch_samples)
        lane, pos = place % self.lanes, place // self.lanes
        even, rest = divmod(self.num_samples, self.lanes)
        length = even + (lane < rest)
        base = lane * even + np.minimum(lane, rest)
        phase = lane * self.window // self.lanes  # lanes do not change windows together
        window = (pos + phase) // self.window
        first = np.maximum(window * self.window - phase, 0)
        last = np.minimum((window + 1) * self.window - phase, length)
        return Places(epoch, lane, window, base + first, last - first, pos - first)

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return shard and index in the shard of each position, both int64 [n]."""
        return self._shuffle(self.places(positions))

    def substitutes(self, position: int, *, global_batch_size: int) -> tuple[Int64s, Int64s]:
        """Return shards and indices of the samples that may stand in for a bad one, in the order to try them.

        They are a ninth of the window apart, so that none of them can be in the same batch; a window too short for
        that has none, and both arrays are empty.
        """
        places = self.places(np.array([position], dtype=np.int64))
        size = int(places.size[0])
        if size < (MAX_SUBSTITUTES + 1) * -(-global_batch_size // self.lanes):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        steps = np.arange(1, MAX_SUBSTITUTES + 1, dtype=np.int64)
        tried = Places(*(np.broadcast_to(values, steps.shape) for values in places))
        offset = (tried.offset + steps * (size // (MAX_SUBSTITUTES + 1))) % size
        return self._shuffle(tried._replace(offset=offset))

    def _shuffle(self, places: Places) -> tuple[Int64s, Int64s]:
        drawn = np.empty_like(places.offset)
        groups = (places.epoch * self.lanes + places.lane) * self._windows_per_lane + places.window
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            r = rows[0]
            table = self._window_table(*(int(v[r]) for v in (places.epoch, places.lane, places.window, places.size)))
            drawn[rows] = table[places.offset[rows]]
        drawn += places.start
        shards, indices = np.empty_like(drawn), np.empty_like(drawn)
        for epoch in np.unique(places.epoch):
            rows = np.flatnonzero(places.epoch == epoch)
            order, starts = self._shard_order(int(epoch))
            k = np.searchsorted(starts, drawn[rows], side="right") - 1
            shards[rows] = order[k]
            indices[rows] = drawn[rows] - starts[k]
        return shards, indices

    def _window_table(self, epoch: int, lane: int, window: int, size: int) -> NDArray[np.uint32]:
        k = key(self._seed, WINDOW, self.sid, epoch, lane, window)
        return self._tables.get((epoch, lane, window), lambda: permutation(size, k).astype(np.uint32))

    def _shard_order(self, epoch: int) -> tuple[NDArray[np.intp], Int64s]:
        def build() -> tuple[NDArray[np.intp], Int64s]:
            order = permutation(len(self.counts), key(self._seed, SHARD, self.sid, epoch))
            ordered = self.counts[order]
            return order, np.cumsum(ordered) - ordered

        return self._epochs.get(epoch, build)


class SlotOrder:
    """The order of a run: slots dealt to sources in exact proportion, then the order of each source.

    Args:
        sources: at least one, each not empty.
        weights: share of each source; proportional to their sizes if None.
        seed: seed of the run.
        start: first slot of this segment.
        bases: position of each source at `start`, so that a source keeps its place when weights change.
        segment: number of the segment, part of the hash.
    """

    def __init__(
        self, sources: Sequence[SourceOrder], *, seed: int, weights: Sequence[float] | None = None,
        start: int = 0, bases: Sequence[int] | None = None, segment: int = 0,
    ) -> None:  # fmt: skip
        self.sources = tuple(sources)
        self.start = start
        self.bases = np.asarray(bases if bases is not None else [0] * len(sources), dtype=np.int64)
        self.quotas = mixture_quotas(weights if weights is not None else [s.num_samples for s in sources])
        self._dealt = np.repeat(np.arange(len(sources)), self.quotas)
        self._seed, self._segment = seed, segment
        self._blocks: _Recent[tuple[Int64s, Int64s]] = _Recent(8)

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(source.num_samples for source in self.sources)

    def route(self, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Return the source and the position in it of each slot, both int64 [n]."""
        if len(self.sources) == 1:
            return np.zeros_like(slots), self.bases[0] + slots - self.start
        block, place = np.divmod(slots - self.start, MIXTURE_BLOCK)
        source, earlier = np.empty_like(slots), np.empty_like(slots)
        for b in np.unique(block):
            rows = np.flatnonzero(block == b)
            block_sources, block_earlier = self._block(int(b))
            source[rows], earlier[rows] = block_sources[place[rows]], block_earlier[place[rows]]
        return source, self.bases[source] + block * np.asarray(self.quotas)[source] + earlier

    def _block(self, block: int) -> tuple[Int64s, Int64s]:
        def build() -> tuple[Int64s, Int64s]:
            k = key(self._seed, MIX, self._segment, block)
            source = self._dealt[permutation(MIXTURE_BLOCK, k)].astype(np.int64)
            earlier = np.empty_like(source)
            for i, quota in enumerate(self.quotas):
                earlier[source == i] = np.arange(quota)
            return source, earlier

        return self._blocks.get(block, build)

    def locate(self, slots: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Return source, shard and index in the shard of each slot, all int64 [n]."""
        source, position = self.route(slots)
        shard, index = np.empty_like(slots), np.empty_like(slots)
        for i in np.unique(source):
            rows = np.flatnonzero(source == i)
            shard[rows], index[rows] = self.sources[i].locate(position[rows])
        return source, shard, index

    def substitutes(self, slot: int, *, global_batch_size: int) -> tuple[int, Int64s, Int64s]:
        """Return the source of a slot, and shards and indices of the samples that may stand in for it."""
        source, position = self.route(np.array([slot], dtype=np.int64))
        order = self.sources[int(source[0])]
        shards, indices = order.substitutes(int(position[0]), global_batch_size=global_batch_size)
        return int(source[0]), shards, indices

    def global_batch(self, consumed: int, *, global_batch_size: int) -> Int64s:
        """Return the slots of a step, int64 [G], in row order: by lane, so that a rank meets few lanes."""
        slots = np.arange(consumed, consumed + global_batch_size, dtype=np.int64)
        source, position = self.route(slots)
        lane = np.empty_like(slots)
        for i, order in enumerate(self.sources):
            rows = source == i
            lane[rows] = order.lane_of(position[rows])
        return slots[np.lexsort((position, source, lane))]


def dealt_before(slot: int, *, quotas: Sequence[int], start: int, seed: int, segment: int) -> Int64s:
    """Return how many of the slots from `start` up to `slot` each source of a segment got, int64 [sources]."""
    if len(quotas) == 1:
        return np.array([slot - start], dtype=np.int64)
    block, place = divmod(slot - start, MIXTURE_BLOCK)
    dealt = np.repeat(np.arange(len(quotas)), quotas)[permutation(MIXTURE_BLOCK, key(seed, MIX, segment, block))]
    return block * np.asarray(quotas, dtype=np.int64) + np.bincount(dealt[:place], minlength=len(quotas))


def mixture_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many slots of a block each source gets: largest remainders, and at least one each.

    Raises:
        UserError: there are more sources than slots.
    """
    if len(weights) > MIXTURE_BLOCK:
        raise UserError(f"data.train names {len(weights):,} sources; a mixture holds at most {MIXTURE_BLOCK:,}")
    total = sum(Fraction(w) for w in weights)
    exact = [Fraction(w) * MIXTURE_BLOCK / total for w in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: MIXTURE_BLOCK - sum(quotas)]:
        quotas[i] += 1
    while 0 in quotas:
        quotas[quotas.index(max(quotas))] -= 1
        quotas[quotas.index(0)] = 1
    return tuple(quotas)


class _Recent(Generic[_Value]):
    """The most recently used results of a pure function."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: dict[Hashable, _Value] = {}

    def get(self, name: Hashable, build: Callable[[], _Value]) -> _Value:
        value = self._values.pop(name, None)
        if value is None:
            value = build()
            if len(self._values) >= self._capacity:
                del self._values[next(iter(self._values))]
        self._values[name] = value
        return value
