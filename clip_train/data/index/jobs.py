"""Do the same to many things in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from clip_train.data.workers import obey_parent_only
from clip_train.distributed.stop import STOP_SIGNALS
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


def run_jobs(function: Callable[[T], R], items: Sequence[T], *, jobs: int, chunk: int = 1) -> Generator[R, None, None]:
    """Yield the results of a function in the order of its arguments. Interrupted, it ends with what is under way.

    Args:
        function: can be pickled; its errors are raised here.
        items: the arguments.
        jobs: processes; one, or one chunk, stays in this process.
        chunk: items that travel together.

    Raises:
        ClipTrainError: a process was killed.
    """
    if jobs <= 1 or len(items) <= chunk:
        yield from map(function, items)
        return
    # Spawned, not forked: the parent may hold threads of torch.
    pool = ProcessPoolExecutor(
        min(jobs, len(items)), mp_context=multiprocessing.get_context("spawn"), initializer=obey_parent_only
    )
    try:
        with _uninterrupted():
            results = pool.map(function, items, chunksize=chunk)
        yield from results
    except BrokenProcessPool as error:
        raise ClipTrainError(
            f"one of {jobs} processes was killed, perhaps for want of memory: fewer --jobs need less"
        ) from error
    finally:
        with _uninterrupted():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C and its like waiting, and from the processes that are started within for good.

    A terminal or a launcher asks all processes of a group: one that died while it sent a result would keep its parent
    waiting for ever.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
