"""Open a shard as a stream: a local file, a URL or, where the user allowed it, the output of a command."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from clip_train.errors import IntegrityError, reading
from clip_train.storage.remote import PIPE, is_remote, open_remote

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20
_EXIT_SECONDS = 0.5


@contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    """Open a shard for reading from front to back. Whether commands are allowed is decided before (data/config.py).

    Raises:
        UserError: it is absent or forbidden.
        IntegrityError: it cannot be reached, or the command fails.
    """
    if url.startswith(PIPE):
        with _output_of(url) as stream:
            yield stream
    elif is_remote(url):
        with open_remote(url) as stream:
            yield stream
    else:
        with _local(url) as stream:
            yield stream


def _local(path: str) -> IO[bytes]:
    with reading(path):
        return Path(path).open("rb")


@contextmanager
def _output_of(url: str) -> Iterator[IO[bytes]]:
    with subprocess.Popen(url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, bufsize=_CHUNK_BYTES) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            while process.stdout.read(_CHUNK_BYTES):  # a tar ends before its stream does
                pass
        except BaseException as error:
            code = _exit_code(process) if isinstance(error, Exception) else None
            process.kill()
            if code:  # then the rest of its output, and not its content, is what could not be read
                raise IntegrityError(f"{url}: the command ended with {code}") from error
            raise
        code = process.wait()
    if code:
        raise IntegrityError(f"{url}: the command ended with {code}")


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Return how a command ended, None for one that still writes."""
    try:
        return process.wait(timeout=_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None
