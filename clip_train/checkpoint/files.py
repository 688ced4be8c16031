"""Files that are on the disk when the call returns, hashed as they are written."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    Chunks = Iterable[bytes | memoryview]

CHUNK_BYTES = 16 * 2**20

# The names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest knows of one file."""

    bytes: int
    sha256: str


def write_file(path: Path, *, chunks: Chunks) -> FileRecord:
    """Write a new file, flush it to the disk and return its size and hash.

    Raises:
        OSError: the disk is full, failed, or the file exists.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            size += len(rest)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def write_files(folder: Path, *, contents: Mapping[str, Chunks]) -> dict[str, FileRecord]:
    """Write new files into `folder`, given as pieces by name; return their records.

    Raises:
        OSError: see `write_file`.
    """
    return {name: write_file(folder / name, chunks=chunks) for name, chunks in contents.items()}


def replace_file(path: Path, content: bytes) -> None:
    """Give a small file other contents, in one step that a crash cannot halve."""
    part = path.with_name(f".part-{path.name}-{os.getpid()}")
    part.unlink(missing_ok=True)
    write_file(part, chunks=[content])
    part.rename(path)
    sync_directory(path.parent)


def hash_file(path: Path) -> FileRecord:
    """Read a file and return its size and hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk: without this, a finished rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_chunks(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] = MappingProxyType({})
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file of CPU tensors piece by piece.

    The library's own writer flushes nothing, hashes nothing and hides the error number; the format is one JSON header
    (8-byte length, padded to 8 bytes) and the raw little-endian tensors in its order.
    """
    # Wide types first keeps every tensor aligned to its own element.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        rows = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(rows), CHUNK_BYTES):
            yield rows[start : start + CHUNK_BYTES]
