"""Walk a tar file by its headers and group its members into samples. Extracts nothing.

Reading tars as a stream loses data without an error: a damaged header or a zero block ends the shard silently. This
walk accepts only what it fully understands and names the shard and the byte offset of everything else.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import TYPE_CHECKING, NamedTuple

from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20
_MAX_PADDING = 1 << 20  # writers fill up a record, mostly of 10 KiB; a preallocated file ends in what was not written
_CHUNK = 4096  # bytes that are read at a time: what stands between two pictures, mostly
_ZERO_BLOCK = bytes(BLOCK)
_SORTED = " (`tar --sort=name` puts them so)"
_CHECKSUM_BLANKS = 8 * 0x20
_ADLER_MODULUS = 65521
_REGULAR = frozenset((b"0", b"\0", b"7"))
_EXTENDED = frozenset((b"L", b"K", b"x", b"g"))  # GNU long name and long link, PAX for one member and for all
_FOLDER = b"5"
_UNSUPPORTED = {
    b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file",
}  # fmt: skip
# webdataset's rule (tariterators.base_plus_ext): the key ends at the first dot of the base name.
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)


class _CutOffError(IntegrityError):
    """A tar that ends too early; everything before its end can be trusted."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of the content, in bytes, a multiple of 512
    size: int


class TarSample(NamedTuple):
    """The members of a tar that share a key."""

    key: str
    members: dict[str, Member]  # by extension, lower-cased, without the first dot


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-cased extension of a member's name, or None for a name that belongs to no sample."""
    match = _KEY_AND_EXTENSION.match(name)
    return (match[1], match[2].lower()) if match else None


def read_samples(path: Path, *, on_cut: Callable[[str], None] | None = None) -> Iterator[TarSample]:
    """Yield the samples of a shard in file order.

    Args:
        path: the tar.
        on_cut: called with the message if the file is cut off, instead of an error; the members before that are used.

    Raises:
        IntegrityError: the tar is damaged, a key comes back after another one, or a member is repeated.
        UserError: the file cannot be opened.
    """
    finished: set[str] = set()
    current: TarSample | None = None
    for member in walk_tar(path, on_cut=on_cut):
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        if current is None or key != current.key:
            if current is not None:
                finished.add(current.key)
                yield current
            if key in finished:
                raise _damaged(
                    path,
                    member.offset,
                    f"the members of sample {key!r} are not next to each other{_SORTED}",
                )
            current = TarSample(key, {})
        if extension in current.members:
            raise _damaged(path, member.offset, f"sample {key!r} has two members .{extension}")
        current.members[extension] = member
    if current is not None:
        yield current


def walk_tar(path: Path, *, on_cut: Callable[[str], None] | None = None) -> Iterator[Member]:
    """Yield the regular members of a tar in file order: ustar, GNU long names, PAX paths and sizes, base-256 sizes.

    A file that ends between two members, without the end marker, counts as cut off: nothing tells it from a shard
    that lost its tail there.

    Args:
        path: the tar.
        on_cut: called with the message if the file is cut off, instead of an error; what came before is yielded.

    Raises:
        IntegrityError: a header checksum is wrong, the end marker of two zero blocks is missing or is followed by
            data, or a member is a link, a device or sparse.
        UserError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not size:
                raise IntegrityError(f"{path} is empty (0 bytes); a tar has at least its end marker")
            yield from _walk(path, file.fileno(), size)
    except _CutOffError as error:
        if on_cut is None:
            raise
        on_cut(str(error))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _walk(path: Path, file: int, end: int) -> Iterator[Member]:
    position = start = 0
    name: str | None = None  # from an extended header, for the next member only
    size: int | None = None
    chunk = b""
    while True:
        if not start <= position <= start + len(chunk) - BLOCK:
            start, chunk = position, os.pread(file, _CHUNK, position)
        header = chunk[position - start : position - start + BLOCK]
        if header == _ZERO_BLOCK:
            break
        kind, stored_size = _kind_and_size(path, header, position)
        if size is not None and kind in _REGULAR:
            stored_size = size
        content = position + BLOCK
        position = content + -(-stored_size // BLOCK) * BLOCK
        if position > end:
            raise _CutOffError(
                f"{path} at byte {content}: the file is cut off: a member of {stored_size} bytes begins here"
            )
        if kind in _EXTENDED:
            payload = os.pread(file, stored_size, content)
            if kind == b"L":
                name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                name, size = _pax(path, content, payload, name)
            continue
        if name is None:
            name = _name(header)
        if kind in _REGULAR and not name.endswith("/"):  # before POSIX only the slash told a folder
            yield Member(name, content, stored_size)
        name = size = None
    _check_end(path, file, position, end=end)


def _kind_and_size(path: Path, header: bytes, position: int) -> tuple[bytes, int]:
    """Check a header and return the member's type flag and stored size."""
    if len(header) < BLOCK:
        error = _CutOffError if position else IntegrityError  # what is not even one block is no tar
        raise error(f"{path} at byte {position}: the file is cut off: there is no end marker{_guess(header, position)}")
    if not _checksum_is_right(header):
        raise _damaged(path, position, f"the header checksum is wrong{_guess(header, position)}")
    kind, size = header[156:157], _number(header[124:136])
    if size is None:
        raise _damaged(path, position, "the member size is not a number")
    if kind in _EXTENDED:
        if size > _MAX_EXTENDED_HEADER:
            raise _damaged(path, position, f"an extended header has {size} bytes")
    elif kind == _FOLDER:
        size = 0  # whatever the field says, a folder has no content
    elif kind not in _REGULAR:
        what = _UNSUPPORTED.get(kind, f"member of unknown type {kind!r}")
        raise _damaged(path, position, f"{_name(header)!r} is a {what}; shards hold regular files only")
    return kind, size


def _check_end(path: Path, file: int, position: int, *, end: int) -> None:
    """Two zero blocks end a tar; whatever follows must be padding, and not much of it."""
    if end - position < 2 * BLOCK:
        raise _CutOffError(f"{path} at byte {position}: the file is cut off inside its end marker")
    for start in range(position, end, 1 << 20):
        piece = os.pread(file, 1 << 20, start)
        if piece.count(0) != len(piece):
            raise _damaged(path, position, "a zero block stands here, but data follows it")
    if end - position > _MAX_PADDING:
        raise _CutOffError(
            f"{path} at byte {position}: only zeros follow, {end - position:,} bytes of them: space was reserved "
            "for the file, but it was not written to its end"
        )


def _checksum_is_right(header: bytes) -> bool:
    stored = _number(header[148:156])
    if stored is None:
        return False
    # Adler-32's low half is 1 plus the sum of the bytes modulo 65521: 20 times faster than sum() over the bytes.
    blanked = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + _CHECKSUM_BLANKS
    if (blanked - stored) % _ADLER_MODULUS == 0:
        return True
    # Some old writers summed signed bytes.
    return stored == _signed_sum(header)


def _signed_sum(header: bytes) -> int:
    blanked = header[:148] + header[156:]
    return sum(byte - 256 if byte > 127 else byte for byte in blanked) + _CHECKSUM_BLANKS


def _number(field: bytes) -> int | None:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(path: Path, offset: int, payload: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Return path and size from PAX records of the form `LENGTH KEY=VALUE\\n`."""
    size: int | None = None
    position = 0
    while position < len(payload):
        length, space, _ = payload[position : position + 20].partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(payload) - position:
            raise _damaged(path, offset + position, "a PAX record is malformed")
        record = payload[position + len(length) + 1 : position + int(length)]
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _damaged(path, offset + position, "a PAX record is malformed")
        value = value[:-1]
        if keyword == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            if not value.isdigit():
                raise _damaged(path, offset + position, "a PAX size is not a number")
            size = int(value)
        elif keyword.startswith(b"GNU.sparse."):
            raise _damaged(path, offset, "a sparse member; shards hold regular files only")
        position += int(length)
    return name, size


def _guess(header: bytes, position: int) -> str:
    if position == 0 and header.startswith(b"\x1f\x8b"):
        return ": this is a gzip file; shards are plain tar files (data.reader=streaming reads packed ones)"
    if position == 0 and header.lstrip()[:1] == b"<":
        return ": this looks like an HTML or XML page, not a tar"
    return ""


def _damaged(path: Path, offset: int, what: str) -> IntegrityError:
    return IntegrityError(f"{path} at byte {offset}: {what}")
