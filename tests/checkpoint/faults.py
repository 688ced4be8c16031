"""A disk that fails, loses power at a chosen operation or is full after some bytes; ranks that write in one process."""

import errno
import fcntl
import os
import threading
from contextlib import contextmanager
from pathlib import Path

from clip_train.checkpoint.writers import Writers
from clip_train.distributed.world import World

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "link")


class PowerLoss(BaseException):
    """The process is gone: no handler of the code under test may catch this."""


class Disk:
    """Counts file operations below `root` and raises at the `fail_at`-th, from 1.

    With a power loss, a write is torn, and files that were not flushed lose half of what they held.
    """

    def __init__(self, root: Path, *, fail_at: int, error: type[BaseException] | OSError = PowerLoss) -> None:
        self.root = str(root)
        self.fail_at = fail_at
        self.error = error
        self.calls = 0
        self.failed = False
        self._dirty: set[tuple[int, int]] = set()

    @contextmanager
    def installed(self, monkeypatch):
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, self._wrap(name, getattr(os, name)))
            yield self

    def _wrap(self, name, real):
        def operation(*args, **kwargs):
            if not is_below(self.root, kwargs.get("dir_fd") or args[0]):
                return real(*args, **kwargs)
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.calls += 1
            if self.calls >= self.fail_at and (not self.failed or self.error is PowerLoss):
                self.failed = True
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                self._fail()
            if name == "write":
                self._dirty.add(self._inode(args[0]))
            if name == "fsync":
                self._dirty.discard(self._inode(args[0]))
            return real(*args, **kwargs)

        return operation

    def _inode(self, descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino

    def _fail(self) -> None:
        if self.error is not PowerLoss:
            raise self.error
        for path in Path(self.root).rglob("*"):
            status = path.stat()
            if path.is_file() and (status.st_dev, status.st_ino) in self._dirty:
                os.truncate(path, status.st_size // 2)
        raise PowerLoss


class Quota:
    """Takes so many bytes of written files below `root`, then half of a write, then nothing: a full disk."""

    def __init__(self, root: Path, *, num_bytes: int) -> None:
        self.root = str(root)
        self.left = num_bytes
        self.was_full = False

    @contextmanager
    def installed(self, monkeypatch):
        real = os.write

        def write(descriptor, content):
            if not is_below(self.root, descriptor):
                return real(descriptor, content)
            if self.left <= 0:
                self.was_full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= (taken := min(len(content), self.left))
            return real(descriptor, content[:taken])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            yield self


class Ranks:
    """Threads that write one checkpoint together as ranks do, in an order that is always the same."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._meeting = threading.Barrier(size, action=self._act)
        self._acts: list = [None] * size
        self._outcomes: list = []
        self._power_loss: BaseException | None = None

    def writers(self, rank: int) -> Writers:
        """Return what stands in for one rank's `Writers`: it agrees by a barrier instead of a process group."""
        ranks = self

        class OfOneRank(Writers):
            def __init__(self) -> None:
                self.world = World(rank=rank, size=ranks.size)

            def agree(self, act):
                ranks._acts[rank] = act
                ranks._meeting.wait(60)
                return ranks._result()

        return OfOneRank()

    def _act(self) -> None:
        self._outcomes = []
        for act in self._acts:
            try:
                self._outcomes.append((act(), None))
            except Exception as error:
                self._outcomes.append((None, error))
            except BaseException as error:
                self._power_loss = error
                return

    def _result(self) -> list:
        if self._power_loss is not None:
            raise self._power_loss
        for _, error in self._outcomes:
            if error is not None:
                raise error
        return [value for value, _ in self._outcomes]


def is_below(root: str, target) -> bool:
    """Return whether a path or a descriptor belongs to what is below a folder."""
    return str(_path_of(target) if isinstance(target, int) else os.fspath(target)).startswith(root)


def _path_of(descriptor: int) -> str:
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
