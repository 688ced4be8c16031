"""A disk that fails or loses power at a chosen operation."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

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
            if not self._is_ours(kwargs.get("dir_fd") or args[0]) or (name == "open" and not args[1] & os.O_CREAT):
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

    def _is_ours(self, target) -> bool:
        return str(_path_of(target) if isinstance(target, int) else os.fspath(target)).startswith(self.root)

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


def _path_of(descriptor: int) -> str:
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
