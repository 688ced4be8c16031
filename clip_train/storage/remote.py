"""List and fetch files by URL through fsspec, with retries. Keys and endpoints come from the environment or a login.

Clients are opened in the process that uses them and on first use, so never before a fork.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from clip_train.errors import UserError
from clip_train.storage import public
from clip_train.storage.retry import TransportError, retry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SCHEMES = (
    "http", "https", "s3", "gs", "gcs", "hf", "memory", "az", "abfs", "abfss", "hdfs", "webhdfs", "sftp", "ssh", "ftp",
)  # fmt: skip
PIPE = "pipe:"
FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS, _READ_SECONDS = 30, 60
_EXTRAS = {"http": "remote", "https": "remote", "s3": "remote", "gs": "gcs", "gcs": "gcs"}
_FORBIDDEN = (401, 403)
_ABSENT = (404, 410)
_SCHEME = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_WEB = ("http://", "https://")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_RETRIED_STATUSES = (408, 425, 429)  # the server asks for another attempt


def is_remote(name: str) -> bool:
    """Return whether a name is a URL and not a local path."""
    return "://" in name


def with_lower_scheme(url: str) -> str:
    """Return a URL with its scheme in small letters, which mean the same. A path or a command stays as it is."""
    return _SCHEME.sub(lambda scheme: scheme[0].lower(), url)


def check_scheme(name: str, *, field: str) -> None:
    """Check that a URL's scheme is one that may be opened.

    Raises:
        UserError: it is not.
    """
    scheme = name.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{field}={name}: {scheme}:// is not one of {', '.join(SCHEMES)}")


def filesystem(url: str, *, public_only: bool = False) -> tuple[Any, str]:
    """Return fsspec's file system for a URL and the file's name in it.

    With `public_only` it connects to public addresses only, here and in all functions below.

    Raises:
        UserError: the library for the scheme is not installed, or with `public_only` its host cannot be checked.
    """
    import fsspec

    url = with_lower_scheme(url)
    scheme = url.partition("://")[0]
    if public_only and scheme not in public.SCHEMES:
        raise UserError(f"{url}: with data.public_only=true shards are read from {', '.join(public.SCHEMES)} only")
    options: dict[str, Any] = {}
    try:
        if url.startswith(_WEB):
            import aiohttp

            # A large shard may take long; a silent connection may not. The default counts both together.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": not public_only}}
            if public_only:
                options["get_client"] = public.public_session
        elif scheme == "s3":
            options = {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}}
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f'`pip install "clip-train[{extra}]"`' if extra else f"install its library ({error})"
        raise UserError(f"{url}: {scheme}:// needs a library that is not installed: {how}") from error
    return fs, path


def list_shards(pattern: str, *, public_only: bool = False) -> list[str]:
    """Return the URLs that a glob or a folder (its `*.tar`) names, unsorted; [] if there are none.

    Raises:
        UserError: the place is forbidden or cannot list.
        IntegrityError: it cannot be reached.
    """
    pattern = pattern if "*" in pattern else f"{pattern.rstrip('/')}/*.tar"

    def act(fs: Any, path: str) -> list[str]:
        return [fs.unstrip_protocol(found) for found in fs.glob(path)]

    try:
        return _retried(act, url=pattern, public_only=public_only)
    except NotImplementedError as error:
        raise UserError(f"{pattern}: this place cannot list its files; name the shards with braces") from error


def size_of(url: str, *, public_only: bool = False) -> int | None:
    """Return a file's size in bytes, None if the server does not tell.

    Raises:
        UserError: the file is absent or forbidden.
        IntegrityError: it cannot be reached.
    """
    return _retried(lambda fs, path: fs.info(path).get("size"), url=url, public_only=public_only)


def read_file(url: str, *, public_only: bool = False) -> bytes | None:
    """Return the content of a small file that may be absent; None if it is.

    Where listing is forbidden, object stores call an absent file forbidden: that counts as absent too.

    Raises:
        UserError: the server refuses for another reason.
        IntegrityError: it cannot be reached.
    """

    def act(fs: Any, path: str) -> bytes | None:
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, PermissionError) as error:
            if public.find_private(error):
                raise
            return None
        except Exception as error:
            if getattr(error, "status", None) in _FORBIDDEN:
                return None
            raise

    return _retried(act, url=url, public_only=public_only)


def has_ranges(url: str, *, public_only: bool = False) -> bool:
    """Return whether pieces of a file can be read, without the file before and behind them.

    Raises:
        UserError: the file is absent or forbidden.
        IntegrityError: it cannot be reached.
    """

    def act(fs: Any, path: str) -> bool:
        try:
            with fs.open(path, "rb", cache_type="none") as file:
                file.seek(1)
                return len(file.read(1)) == 1
        except ValueError:  # what fsspec raises where a server ignores the range
            return False

    return _retried(act, url=url, public_only=public_only)


def read_range(url: str, *, start: int, length: int, public_only: bool = False) -> bytes:
    """Return a piece of a file on a place that `has_ranges`.

    Raises:
        UserError: the file is absent or forbidden.
        IntegrityError: the piece did not arrive whole in 6 attempts.
    """

    def act(fs: Any, path: str) -> bytes:
        content = fs.cat_file(path, start=start, end=start + length) if length else b""
        if len(content) != length:
            raise TransportError(f"{url} at byte {start}: {len(content)} of {length} bytes arrived")
        return content

    return _retried(act, url=url, public_only=public_only)


def open_remote(url: str) -> IO[bytes]:
    """Open a file for reading from front to back.

    Raises:
        UserError: the file is absent or forbidden.
        IntegrityError: it cannot be reached.
    """
    return _retried(lambda fs, path: fs.open(path, "rb"), url=url)


def download(url: str, path: Path, *, size: int | None, sha256: str | None, public_only: bool = False) -> None:
    """Fetch a whole file, check its size and hash, and flush it to the disk.

    Args:
        url: the file.
        path: where to write; whatever is there is overwritten, and never removed.
        size: bytes it must have; None if unknown.
        sha256: what it must hash to; None if unknown.
        public_only: connect to public addresses only.

    Raises:
        UserError: the file is absent or forbidden, or `path` cannot be written.
        IntegrityError: it did not arrive whole in 6 attempts; the message names URL and byte.
    """

    def act(fs: Any, inner: str) -> None:
        fs.get_file(inner, str(path))
        arrived = path.stat().st_size
        if size is not None and arrived != size:
            raise TransportError(f"{url} at byte {arrived}: {arrived} bytes arrived, not {size}")
        with path.open("rb") as file:
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise TransportError(f"{url}: its {arrived} bytes do not match their sha256")
            os.fsync(file.fileno())

    _retried(act, url=url, public_only=public_only, path=path)


def upload(path: Path, url: str) -> None:
    """Store a file, over what is there, and check that all of it arrived.

    Raises:
        UserError: the place is forbidden.
        IntegrityError: it did not arrive whole in 6 attempts.
    """
    size = path.stat().st_size

    def act(fs: Any, inner: str) -> None:
        fs.makedirs(inner.rpartition("/")[0], exist_ok=True)  # object stores have no folders and do nothing
        fs.put_file(str(path), inner)
        arrived = fs.info(inner).get("size")
        if arrived is not None and arrived != size:
            raise TransportError(f"{url}: {arrived} bytes arrived, not {size}")

    _retried(act, url=url)


def list_names(folder: str) -> list[str]:
    """Return the names of what lies in a folder, sorted; [] if it is absent.

    Raises:
        UserError: the place is forbidden.
        IntegrityError: it cannot be reached.
    """

    def act(fs: Any, inner: str) -> list[str]:
        try:
            return sorted(name.rstrip("/").rpartition("/")[2] for name in fs.ls(inner, detail=False))
        except FileNotFoundError:
            return []

    return _retried(act, url=folder)


def delete(url: str) -> None:
    """Delete a file, or a folder with all in it; nothing happens if it is absent.

    Raises:
        UserError: the place is forbidden.
        IntegrityError: it cannot be reached.
    """

    def act(fs: Any, inner: str) -> None:
        if fs.exists(inner):
            fs.rm(inner, recursive=True)

    _retried(act, url=url)


def _retried(
    act: Callable[[Any, str], Any], *, url: str, public_only: bool = False, path: Path | None = None
) -> Any:  # fmt: skip
    """Call `act` with the file system of `url` and the name in it, again and again while the transport fails.

    path: the local file that is being written.
    """

    def attempt() -> Any:
        try:
            return act(*filesystem(url, public_only=public_only))
        except public.PrivateAddress as refusal:
            raise UserError(f"{url}: {refusal}") from refusal
        except (TransportError, UserError, NotImplementedError):
            raise
        except Exception as error:  # each file system raises its library's own
            raise _classified(error, url=url, path=path) from error

    return retry(attempt, first_wait=FIRST_WAIT_SECONDS)


def _classified(error: Exception, *, url: str, path: Path | None) -> Exception:
    """Tell a user's mistake from failing transport."""
    if isinstance(error, FileNotFoundError) and url.startswith(_WEB) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says "not found" of whatever kept it from learning a file's size
    status = getattr(error, "status", None)  # aiohttp's errors have one
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if refusal := public.find_private(error):
        return UserError(f"{url}: {refusal}")
    if isinstance(error, FileNotFoundError) or status in _ABSENT:
        return UserError(f"{url}: not found")
    if isinstance(error, PermissionError) or status in _FORBIDDEN:
        return UserError(f"{url}: forbidden ({what}); keys come from the environment or a login")
    if isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUSES:
        return UserError(f"{url}: the server refuses ({what})")
    if type(error).__name__ == "NoCredentialsError":
        return UserError(f"{url}: {what}; keys come from the environment or a login")
    if path is not None and isinstance(error, OSError) and (error.filename == str(path) or error.errno in _DISK_ERRORS):
        return UserError(f"{path} cannot be written: {error.strerror}")
    arrived = path.stat().st_size if path is not None and path.exists() else 0
    return TransportError(f"{url} at byte {arrived}: {what}")


def folder_of(url: str) -> str:
    """Return the URL of a file's folder, without a slash at its end and without a signature."""
    return url.partition("?")[0].rpartition("/")[0]


def beside(url: str, ending: str) -> str:
    """Return the URL of the file beside a shard that has its name with another ending, and its signature."""
    path, mark, query = url.partition("?")
    return f"{path.removesuffix('.tar')}{ending}{mark}{query}"


def common_folder(urls: Sequence[str]) -> str:
    """Return the folder that holds all of the URLs, without a slash at its end."""
    parts = [folder_of(url).split("/") for url in urls]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "/".join(names[0] for names in same)
