"""Do something with hostile bytes, which may hang, crash or run out of memory: here, or in a process of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.images.decode import BadSampleError

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[Callable[[], None]], None]

CPU_SECONDS = 10
_WALL_SECONDS = 30.0  # for a process that waits instead of computing
_EXTRA_BYTES = 4 << 30  # of address space; the largest picture that is allowed takes a third of it
_MAX_REASON_BYTES = 1000


def run_here(act: Callable[[], None]) -> None:
    """Call `act`."""
    act()


def run_bounded(act: Callable[[], None]) -> None:
    """Call `act` in this process, which the system ends by SIGPROF if that takes 10 seconds of processor time.

    For a loader process, which is replaced: native code that hangs hears nothing else. It costs a microsecond.
    """
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        act()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run_apart(act: Callable[[], None]) -> None:
    """Call `act` in a forked process that may use 10 seconds of processor time. It leaves results in shared memory.

    Raises:
        BadSampleError: `act` raised it; or `too_slow`, `out_of_memory` or `decoder_crashed`, which may depend on the
            machine and therefore have names of their own.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _act_and_exit(act, writing)
    os.close(writing)
    try:
        done, _, _ = select.select([reading], [], [], _WALL_SECONDS)
        reason = os.read(reading, _MAX_REASON_BYTES).decode() if done else "too_slow"
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if reason:
        raise BadSampleError(reason)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by == signal.SIGXCPU:
        raise BadSampleError("too_slow")
    if status:
        raise BadSampleError("decoder_crashed")


def _act_and_exit(act: Callable[[], None], writing: int) -> None:
    """Leave nothing of this copy of the worker behind: no handlers, no clean-up, no core file."""
    reason = "decoder_crashed"
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _EXTRA_BYTES,) * 2)
        act()
        reason = ""
    except BadSampleError as error:
        reason = error.reason
    except MemoryError:
        reason = "out_of_memory"
    finally:
        os.write(writing, reason.encode())
        os._exit(0)


def _address_space() -> int:
    """Return the bytes that this process has mapped, which is far more than it uses."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return 64 << 30  # no /proc, as on macOS
    return pages * resource.getpagesize()
