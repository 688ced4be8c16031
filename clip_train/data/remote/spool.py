"""Bring remote shards to this machine before they are needed. The order is known, so there is nothing to guess.

1. `Schedule` walks the coming batches of this machine's ranks and notes when each shard is needed first and last.
2. A process of its own, one per machine, downloads in the order of first need, as far ahead as the cache has room, and
   publishes the plan (data/remote/cache.py), by which every process chooses what to evict.
3. Samples whose place in their shard is known are read by themselves until the shard is here, if its server gives
   pieces of files. Else the ranks wait together until the shards of the first batch are here, or as many of them as
   there is room for, so that none times out while others download. Later a worker that finds a shard absent downloads
   it itself.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from math import ceil, inf
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TYPE_CHECKING, Any

from clip_train.data.remote.cache import CacheFull, RemoteShard, ShardCache
from clip_train.data.remote.index import DOWNLOADS
from clip_train.data.remote.schedule import Rows, Schedule, ShardId
from clip_train.data.workers import start_worker
from clip_train.distributed.collectives import gather_objects
from clip_train.errors import ClipTrainError, UserError
from clip_train.storage.remote import has_ranges, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    from clip_train.data.order import SlotOrder
    from clip_train.data.source import Source
    from clip_train.distributed.world import World

_PLANNING_SECONDS = 0.2  # between two looks at what is to be downloaded
_POLL_SECONDS = 0.1
_SECONDS_BETWEEN_PLANS = 1.0
_SECONDS_BETWEEN_SIGNS = 0.5
_SECONDS_BETWEEN_LINES = 10.0
_SHARDS_PER_LANE = 3  # beyond those of a window: the two that it begins and ends in, and one that is on its way


class Spool:
    """Downloads what this machine's ranks will read. Every rank has one; the first of a machine does the work.

    Args:
        sources: of the run; those with a cache are remote.
        order: which sample stands at each slot.
        world: which rows are read on this machine. Ranks of a machine must be neighbours, as torchrun numbers them.
        global_batch_size: slots of a batch.
        ahead: slots to look ahead at most.
    """

    def __init__(
        self, sources: Sequence[Source], *, order: SlotOrder, world: World, global_batch_size: int, ahead: int
    ) -> None:
        self._sources = tuple(sources)
        self._order = order
        self._world = world
        self._global_batch_size = global_batch_size
        self._ahead = ahead
        rows, first = global_batch_size // world.size, world.rank - world.local_rank
        self._rows = Rows(first * rows, min(first + ranks_here(world), world.size) * rows)
        self._context = ForkServerContext()  # as the workers'
        self._consumed: Any = self._context.Value("q", 0, lock=False)
        self._full: Any = self._context.Value("b", 0, lock=False)  # nothing comes, for want of room
        self._process: ForkServerProcess | None = None
        self._errors: Connection | None = None

    def start(self, consumed: int) -> bool:
        """Download from slot `consumed` on; return when every machine can read the first batch. All ranks call it.

        Returns:
            whether samples may be read by themselves before their shards are here.

        Raises:
            ClipTrainError: what stands in the way of a shard of the first batch.
        """
        self.close()
        if self._world.local_rank == 0:
            self._start_process(consumed)
        said = time.monotonic()
        schedule = self._schedule(consumed)
        needed = [self._shard(shard) for shard in schedule.of_batch(consumed) if self._is_remote(shard)]
        # Asked of a small file where there is one: a server that ignores ranges begins to send the whole.
        known = [s.records if is_remote(s.records) else s.url for s in needed if s.records is not None]
        public_only = any(source.cache is not None and source.cache.public_only for source in self._sources)
        in_pieces = bool(known) and has_ranges(known[0], public_only=public_only)
        needed = [shard for shard in needed if shard.records is None or not in_pieces]
        while True:
            missing, error = sum(shard.missing_bytes() for shard in needed), self._error()
            everywhere = gather_objects((missing, error, bool(self._full.value)), world=self._world)
            for _, failure, _ in everywhere:
                if failure is not None:
                    raise failure
            missing = sum(self._to_come(everywhere)) // ranks_here(self._world)
            if not missing:
                return in_pieces
            if self._world.is_main and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                line = f"waiting for the shards of the first batch: {missing / 1e6:,.1f} MB to come"
                print(line, file=sys.stderr, flush=True)
            time.sleep(_SECONDS_BETWEEN_SIGNS if self._world.size > 1 else _POLL_SECONDS)

    def _to_come(self, everywhere: Sequence[tuple[int, ClipTrainError | None, bool]]) -> Iterator[int]:
        """Yield the bytes that each rank waits for, 0 where its machine has no room for more."""
        size = ranks_here(self._world)
        for first in range(0, len(everywhere), size):
            machine = everywhere[first : first + size]
            full = any(full for _, _, full in machine)
            yield from (0 if full else missing for missing, _, _ in machine)

    def advance(self, consumed: int) -> None:
        """Tell how far the run is."""
        self._consumed.value = consumed

    def close(self) -> None:
        """End the downloads."""
        if self._process is not None:
            self._process.kill()  # the system frees its locks; what it leaves unfinished is overwritten
            self._process.join()
            self._process.close()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _start_process(self, consumed: int) -> None:
        self._consumed.value, self._full.value = consumed, 0
        self._errors, theirs = self._context.Pipe(duplex=False)
        self._process = self._context.Process(
            target=_download_ahead, daemon=True,
            args=(self._sources, self._schedule(consumed), self._ahead, self._consumed, self._full, theirs),
        )  # fmt: skip
        self._process.start()
        theirs.close()

    def _schedule(self, consumed: int) -> Schedule:
        return Schedule(
            self._order, rows=self._rows, global_batch_size=self._global_batch_size, consumed=consumed,
            gap=self._ahead // 2,
        )  # fmt: skip

    def _shard(self, shard: ShardId) -> RemoteShard:
        entry = self._sources[shard.source].shards[shard.shard]
        assert isinstance(entry, RemoteShard)
        return entry

    def _is_remote(self, shard: ShardId) -> bool:
        return self._sources[shard.source].cache is not None

    def _error(self) -> ClipTrainError | None:
        if self._errors is None or not self._errors.poll():
            return None
        try:
            return self._errors.recv()
        except EOFError:  # it was killed: workers download what they need themselves
            self._errors = None
            return None


def _download_ahead(
    sources: Sequence[Source], schedule: Schedule, ahead: int, position: Any, no_room: Any, errors: Connection
) -> None:
    """Download in the order of first need until the trainer ends this process."""
    start_worker(0)
    remote = {
        ShardId(i, k): entry
        for i, source in enumerate(sources)
        for k, entry in enumerate(source.shards)
        if isinstance(entry, RemoteShard)
    }
    caches = [source.cache for source in sources if source.cache is not None]
    cache, plan = caches[0], caches[0].plan()
    pool = ThreadPoolExecutor(DOWNLOADS)
    running: dict[ShardId, Future[bool]] = {}
    failed: set[ShardId] = set()
    published = -inf
    while True:
        now, consumed = time.monotonic(), int(position.value)
        schedule.forget(consumed)
        while schedule.planned_to < consumed + ahead and time.monotonic() < now + _PLANNING_SECONDS:
            schedule.look_ahead()
        distances = {shard: d for shard, d in schedule.distances(consumed).items() if shard in remote}
        if now - published > _SECONDS_BETWEEN_PLANS:
            published = now
            plan.publish({remote[shard].url: distance for shard, distance in distances.items()})
        full = False
        for shard, download in list(running.items()):
            if download.done():
                del running[shard]
                try:
                    full |= not download.result()
                except ClipTrainError as error:
                    failed.add(shard)  # whoever needs it tries again, and then it counts
                    if len(failed) == 1:
                        errors.send(error)
        no_room.value = full and not running
        for shard, distance in distances.items():
            if full or len(running) >= DOWNLOADS:
                break
            if shard not in running and shard not in failed and remote[shard].missing_bytes():
                running[shard] = pool.submit(_fetch, cache, remote[shard], distance)
        time.sleep(_POLL_SECONDS)


def _fetch(cache: ShardCache, shard: RemoteShard, distance: int) -> bool:
    """Download a shard and return True, or False if there is no room for it now."""
    try:
        with cache.hold(shard, distance=distance, wait=False):
            return True
    except CacheFull:
        return False


def ranks_here(world: World) -> int:
    """Return the number of ranks on this machine; all of them if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def check_room(sources: Sequence[Source], *, lanes: int, window: int, world: World) -> None:
    """Print what the open windows of this machine's lanes take on its disk, and check that it fits.

    Raises:
        UserError: it does not; the message names lanes or a window that would.
    """
    cache = next((source.cache for source in sources if source.cache is not None), None)
    if cache is None:
        return
    share = min(1.0, ranks_here(world) / world.size)
    room = cache.room()
    needed = disk_estimate(sources, lanes=lanes, window=window, share=share)
    total = sum(entry.bytes for source in sources if source.cache is not None for entry in source.shards)
    if world.is_main:
        print(
            f"remote shards: {total / 1e9:,.3g} GB, of which this machine keeps about {needed / 1e9:,.3g} GB in "
            f"{cache.folder} (bound {room / 1e9:,.3g} GB)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if needed <= room:
        return
    choices = [(lanes >> i, window >> j) for j in range(window.bit_length()) for i in range(lanes.bit_length())]
    fitting = [c for c in choices if disk_estimate(sources, lanes=c[0], window=c[1], share=share) <= room]
    what = f"data.lanes={fitting[0][0]} data.window={fitting[0][1]} would fit" if fitting else "no lanes would fit"
    raise UserError(
        f"data.cache: {needed:,} bytes of shards are open at a time with data.lanes={lanes} data.window={window}, but "
        f"{cache.folder} may hold {room:,} (data.cache.max_bytes={cache.max_bytes:,}, or what its disk has left): "
        f"{what}"
    )


def disk_estimate(sources: Sequence[Source], *, lanes: int, window: int, share: float) -> int:
    """Return about how many bytes of remote shards the open windows of a share of the lanes touch."""
    needed = 0
    for source in sources:
        if source.cache is not None:
            total, shards = sum(entry.bytes for entry in source.shards), len(source.shards)
            in_window = min(window, source.num_samples / lanes) * shards / source.num_samples
            needed += min(total, round(ceil(lanes * share) * (in_window + _SHARDS_PER_LANE) * total / shards))
    return needed
