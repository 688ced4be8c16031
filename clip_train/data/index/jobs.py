"""Do the same to many things in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from clip_train.distributed.stop import STOP_SIGNALS
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from multiprocessing.connection import Connection

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE_SECONDS = 5.0  # for a process that is between two items when it should end
_between_items = threading.Lock()  # held by a process of a job whenever it may be sending a result


def run_jobs(function: Callable[[T], R], items: Sequence[T], *, jobs: int, chunk: int = 1) -> Generator[R, None, None]:
    """Yield the results of a function in the order of its arguments.

    After an interruption or an error the processes end at once, whatever they are at, as when this one is killed.

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
    context = multiprocessing.get_context("spawn")
    ended, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(jobs, len(items)), mp_context=context, initializer=_begin, initargs=(ended,))
    try:
        with _uninterrupted():
            results = pool.map(partial(_act, function), items, chunksize=chunk)
        yield from results
    except BrokenProcessPool as error:
        raise ClipTrainError(
            f"one of {jobs} processes was killed, perhaps for want of memory: fewer --jobs need less"
        ) from error
    finally:
        with _uninterrupted():
            end.close()
            pool.shutdown(cancel_futures=True)
            ended.close()


def _begin(ended: Connection) -> None:
    """Prepare a process of a job."""
    _between_items.acquire()
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()


def _end_with(ended: Connection) -> None:
    """Wait until the parent closes its end of a pipe, or is gone, and leave; never amid a result, which it reads."""
    ended.poll(None)
    _between_items.acquire(timeout=_PATIENCE_SECONDS)
    os._exit(1)


def _act(function: Callable[[T], R], item: T) -> R:
    _between_items.release()
    try:
        return function(item)
    finally:
        _between_items.acquire()


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
