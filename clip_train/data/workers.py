"""Start loader processes safely, tune them, and notice when one is gone."""

from __future__ import annotations

import ctypes
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.data.apart import CPU_SECONDS
from clip_train.distributed.stop import STOP_SIGNALS
from clip_train.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset, Sampler

    from clip_train.data.activity import Activity

logger = logging.getLogger(__name__)

# Workers are forked from a server that has no threads, no CUDA and no process group; the trainer has all three.
WORKER_START_METHOD = "forkserver"
WORKER_POLL_SECONDS = 1.0  # between two looks at whether the workers live
# A worker that is silent for so long hangs. Below the 120 s after which other ranks give up waiting for this one.
WORKER_TIMEOUT_SECONDS = 100.0
BATCHES_UNDER_WAY = 4  # at most: the one that is waited for, two ahead, and the pieces of another
MAX_WORKER_FAILURES = 3  # within so many steps:
WORKER_FAILURE_STEPS = 1000
SHARED_MEMORY = Path("/dev/shm")
_PRELOADED = ["clip_train.data.dataset", "clip_train.data.sequential"]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def start_worker_server() -> None:
    """Start the server that workers are forked from, once per process. Returns at once; its imports take seconds."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    # A launcher or a terminal asks a whole process group to stop; the trainer still needs its workers to end the step.
    # What is blocked here stays blocked in the server and in all that it forks.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, former)


def start_worker(_: int) -> None:
    """Prepare a loader process: it ends with its trainer or by its order, and its memory is tuned for pictures."""
    threading.Thread(target=_exit_with_trainer, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and there only kill ends a worker early
        threading.Thread(target=_exit_by_order, daemon=True).start()
    _keep_freed_memory()


def _exit_with_trainer() -> None:
    """DataLoader's workers watch their parent, which here is the server, and the server lives as long as they do."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _exit_by_order() -> None:
    """Obey the trainer's SIGTERM, which is blocked, and nobody else's."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(1)


def _keep_freed_memory() -> None:
    """Keep freed picture buffers in the heap: giving 4 MB back per picture costs 2,000 page faults each."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # only glibc has mallopt, and only speed depends on it


def require_shared_memory(bytes_needed: int) -> None:
    """Check that the pictures under way fit into the system's shared memory: without room a worker dies of SIGBUS.

    Raises:
        UserError: they do not, as in containers, which have 64 MB unless told otherwise.
    """
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return  # other systems keep it elsewhere, and without such a bound
    free = room.f_bavail * room.f_frsize
    if free < bytes_needed:
        gigabytes = math.ceil(bytes_needed / 2**29) / 2
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB left, the batches of this machine's loader workers need "
            f"{bytes_needed / 2**20:,.0f}: start the container with --shm-size={gigabytes:g}g, "
            "or set data.workers=0"
        )


def as_is(item: object) -> object:
    """Collate nothing: an item of the dataset is a batch already."""
    return item


def open_loader(dataset: Dataset, *, workers: int, tasks_per_batch: int, sampler: Sampler | None = None) -> DataLoader:
    """Return the DataLoader of a training stream; each item of the dataset is a task.

    Two batches are under way ahead of the trainer. Results come in order, and `WorkerTasks` watches the workers.
    """
    from torch.utils.data import DataLoader

    if not workers:
        return DataLoader(dataset, sampler=sampler, batch_size=None, collate_fn=as_is)
    return DataLoader(
        dataset, sampler=sampler, batch_size=None, collate_fn=as_is, num_workers=workers, worker_init_fn=start_worker,
        prefetch_factor=tasks_ahead(workers=workers, tasks_per_batch=tasks_per_batch),
        multiprocessing_context=WORKER_START_METHOD, timeout=WORKER_POLL_SECONDS, in_order=True,
    )  # fmt: skip


def tasks_ahead(*, workers: int, tasks_per_batch: int) -> int:
    """Return how many tasks a loader process is given before the trainer asks for the first."""
    return max(2, -(-2 * tasks_per_batch // workers))


class WorkerFailed(Exception):
    """A loader process raised, died or hangs. What it was to do can be done again by another."""


class WorkerTasks:
    """The results of a DataLoader, in order, as long as its workers live. A context manager that ends them.

    Args:
        loader: from `open_loader`. Its dataset must not raise in a worker.
        activity: what its workers note: one that goes on, however slowly, does not hang.
    """

    def __init__(self, loader: DataLoader, *, activity: Activity) -> None:
        self._activity = activity
        others = set(multiprocessing.active_children())
        self._results: Any = iter(loader)
        self._workers = [process for process in multiprocessing.active_children() if process not in others]
        self._asked, self._hung = math.inf, False
        self._closed = threading.Event()
        if self._workers:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> WorkerTasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closed.set()
        if kind is WorkerFailed:
            self._kill()  # one that is stopped or hangs would not hear a request
        self._results = None  # it ends the workers, now and not when some traceback is forgotten
        self._kill()

    def next(self) -> Any:
        """Return the next result.

        Raises:
            WorkerFailed: a worker died, or none began anything for `WORKER_TIMEOUT_SECONDS`.
        """
        asked = time.monotonic()
        while True:
            self._asked = asked
            try:
                return next(self._results)
            except Exception as error:
                if not self._workers:
                    raise
                if self._hung:
                    raise WorkerFailed(f"no worker answered within {WORKER_TIMEOUT_SECONDS:.0f} s") from error
                # The loader's timeout is a RuntimeError after which it can be asked again. What a dying worker leaves
                # behind may be any error: its results come through sockets and shared memory.
                if not isinstance(error, RuntimeError):
                    wait([process.sentinel for process in self._workers], timeout=WORKER_POLL_SECONDS)
                dead = [process for process in self._workers if not process.is_alive()]
                if dead:
                    how = ", ".join(f"process {p.pid} ended with {p.exitcode}{_meaning(p.exitcode)}" for p in dead)
                    raise WorkerFailed(f"{how} ({error!r})") from error
                if not isinstance(error, RuntimeError):
                    raise WorkerFailed(repr(error)) from error
            finally:
                self._asked = math.inf

    def _watch(self) -> None:
        """Kill workers that do not answer: the trainer may be waiting in a read that only their end ends."""
        while not self._closed.wait(WORKER_POLL_SECONDS):
            if time.monotonic() >= max(self._asked, self._activity.latest()) + WORKER_TIMEOUT_SECONDS:
                self._hung = True
                for process in self._workers:
                    process.kill()
                return

    def _kill(self) -> None:
        for process in self._workers:
            process.kill()
            process.join()


def _meaning(exit_code: int | None) -> str:
    return f" (a picture took {CPU_SECONDS} s of processor time)" if exit_code == -signal.SIGPROF else ""


class WorkerFailures:
    """Decides whether a loader may be built once more after a failure."""

    def __init__(self) -> None:
        self.total = 0
        self._steps: deque[int] = deque(maxlen=MAX_WORKER_FAILURES)

    def judge(self, failure: WorkerFailed, *, step: int, where: str) -> None:
        """Say that the loader is rebuilt after a failure in `step`.

        Raises:
            TrainingFailed: it is the fourth one in 1,000 steps.
        """
        if len(self._steps) == MAX_WORKER_FAILURES and step - self._steps[0] < WORKER_FAILURE_STEPS:
            raise TrainingFailed(
                f"loader workers failed {MAX_WORKER_FAILURES + 1} times within {WORKER_FAILURE_STEPS} steps; the last "
                f"time {where}: {failure}"
            ) from failure
        self._steps.append(step)
        self.total += 1
        logger.warning("a loader worker failed %s and is replaced: %s", where, failure)
