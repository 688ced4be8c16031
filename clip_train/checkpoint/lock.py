"""One writer per run directory: `RUN/lock` names it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK_NAME = "lock"
# What exFAT, shared folders of virtual machines and mounted cloud drives answer.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    boot_id: str  # changes when the host starts again
    started: str  # start of the process in clock ticks since boot: a pid is given out again, this pair is not
    slurm_job: str  # empty outside SLURM
    slurm_restart: int

    @staticmethod
    def this_process() -> Owner:
        """Describe this process."""
        return Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot_id=_boot_id(),
            started=_start_time(os.getpid()),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def is_dead(self, *, seen_by: Owner) -> bool:
        """Say whether this owner is certainly gone, as far as the process `seen_by` can tell."""
        if self.slurm_job and self.slurm_job == seen_by.slurm_job and self.slurm_restart < seen_by.slurm_restart:
            return True  # SLURM starts a job again only after its end, perhaps on another host
        if self.host != seen_by.host:
            return False
        if self.boot_id != seen_by.boot_id:
            return True
        return not _is_running(self.pid) or self.started != _start_time(self.pid)


class RunLock:
    """The lock of one run directory, or of a sweep's, held from here to `release`."""

    def __init__(self, run_dir: Path, *, key: str = "run_dir", say: Callable[[str], None] = print) -> None:
        """Take the lock; an owner that died on this host is replaced, and `say` gets a line about it.

        Args:
            run_dir: what is locked.
            key: the config key with which a user names another directory.
            say: gets the line.

        Raises:
            UserError: another process works in this directory, or its lock is not one of ours.
            OSError: the directory cannot be written.
        """
        self.path = run_dir / LOCK_NAME
        self._key = key
        self.owner = Owner.this_process()
        with _one_at_a_time(run_dir):
            holder = self._read()
            if holder is not None:
                self._require_dead(holder)
                say(f"{self.path}: process {holder.pid} on {holder.host} is gone, took over its run directory")
                self.path.unlink(missing_ok=True)
            self._write()

    def release(self) -> None:
        """Give the run directory free, unless somebody else has taken it over."""
        if self._read() == self.owner:
            self.path.unlink()

    def _require_dead(self, holder: Owner) -> None:
        if holder.is_dead(seen_by=self.owner):
            return
        hint = "" if holder.host == self.owner.host else f"; delete {self.path} if that process is gone"
        raise UserError(
            f"{self.path.parent} is in use by process {holder.pid} on {holder.host}: "
            f"choose another {self._key} or stop that process{hint}"
        )

    def _read(self) -> Owner | None:
        try:
            return Owner(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.path}: not a lock file ({error}); delete it if no run uses the directory"
            ) from error

    def _write(self) -> None:
        # A link appears with its contents, flushed, and only one of two hosts gets the name.
        private = self.path.with_name(f".lock-{self.owner.host}-{self.owner.pid}")
        private.unlink(missing_ok=True)
        content = [json.dumps(asdict(self.owner)).encode()]
        try:
            write_file(private, chunks=content)
            try:
                self.path.hardlink_to(private)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                write_file(self.path, chunks=content)  # here another host may see half of it for a moment
        except FileExistsError:
            holder = self._read()
            raise UserError(f"{self.path.parent} was just taken by {holder}") from None
        finally:
            private.unlink(missing_ok=True)


def live_owner(run_dir: Path) -> Owner | None:
    """Return the process that trains in `run_dir` and may be alive, None without one."""
    try:
        holder = Owner(**json.loads((run_dir / LOCK_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return None if holder.is_dead(seen_by=Owner.this_process()) else holder


def is_held_by_another(run_dir: Path) -> bool:
    """Say whether a process that may be alive, other than this one, trains in `run_dir`."""
    return live_owner(run_dir) not in (None, Owner.this_process())


@contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Let the processes of this host look at the lock one after the other."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _start_time(pid: int) -> str:
    try:
        # The name of the program, in brackets, may hold spaces; the start is the 22nd field, the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""  # no /proc, as on macOS
