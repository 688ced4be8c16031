"""Start loader processes safely, and tune them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from multiprocessing import forkserver

# Workers are forked from a server that has no threads, no CUDA and no process group; the trainer has all three.
WORKER_START_METHOD = "forkserver"
_PRELOADED = ["clip_train.data.dataset", "clip_train.data.sequential"]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def start_worker_server() -> None:
    """Start the server that workers are forked from, once per process. Returns at once; its imports take seconds."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()


def start_worker(_: int) -> None:
    """Prepare a loader process: it ends with its trainer, and its memory is tuned for pictures."""
    threading.Thread(target=_exit_with_trainer, daemon=True).start()
    _keep_freed_memory()


def _exit_with_trainer() -> None:
    """DataLoader's workers watch their parent, which here is the server, and the server lives as long as they do."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _keep_freed_memory() -> None:
    """Keep freed picture buffers in the heap: giving 4 MB back per picture costs 2,000 page faults each."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # only glibc has mallopt, and only speed depends on it


def as_is(item: object) -> object:
    """Collate nothing: an item of the dataset is a batch already."""
    return item
