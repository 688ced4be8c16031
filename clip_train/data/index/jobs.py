"""Do the same to many things in several processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, TypeVar

from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


def run_jobs(function: Callable[[T], R], items: Sequence[T], *, jobs: int) -> Iterator[R]:
    """Yield the results of a function in the order of its arguments.

    Args:
        function: can be pickled; its errors are raised here.
        items: the arguments.
        jobs: processes; one, or one item, stays in this process.

    Raises:
        ClipTrainError: a process was killed.
    """
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the parent may hold threads of torch.
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise ClipTrainError(
                f"one of {jobs} processes was killed, perhaps for want of memory: fewer --jobs need less"
            ) from error
