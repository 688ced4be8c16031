"""The tensors of a part on disk: in one file, or in one for each chunk of rows where ranks hold shards.

`model.safetensors` has everything. `model-00002-of-00004.safetensors` has the second of four chunks of every sharded
tensor; what is not sharded lies in the first file. Its metadata tell which rows a tensor has: `{"rows": {"NAME": [first
row, rows of the whole tensor]}}` as JSON. Nothing tells which rank wrote it, and any number of ranks reads any rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from clip_train.checkpoint.safetensors_writer import safetensors_chunks
from clip_train.distributed.shards import chunk_of, own_part
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import EllipsisType

    from torch import Tensor

    from clip_train.distributed.world import World

_CHUNK_NAME = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """Tensors in CPU memory that will be one file."""

    tensors: dict[str, Tensor]
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of a tensor that is a chunk: its first row, and the rows of the whole."""

    @property
    def num_bytes(self) -> int:
        """Size of the file without its header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file piece by piece."""
        return safetensors_chunks(self.tensors, metadata={"rows": json.dumps(self.rows)} if self.rows else {})


def own_files(part: str, tensors: Mapping[str, Tensor], *, world: World) -> dict[str, TensorFile]:
    """Copy to CPU memory what this rank is to write of a part, and return it by file name.

    Rank 0 writes what is not sharded. Of sharded tensors each rank of the first copy writes its rows.
    """
    chunks = {name: chunk_of(tensor) for name, tensor in tensors.items()}
    layouts = {(c.number, c.num_chunks, c.is_first_copy) for c in chunks.values() if c is not None}
    if not layouts:
        copies = {name: _copy(tensor) for name, tensor in tensors.items()} if world.is_main else {}
        return {f"{part}.safetensors": TensorFile(tensors=copies)} if world.is_main else {}
    assert len(layouts) == 1, "tensors of one part are sharded in different ways"
    number, num_chunks, is_first_copy = layouts.pop()
    if not is_first_copy:
        return {}
    assert world.is_main == (number == 0), "the first chunk is that of rank 0"
    mine: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        chunk = chunks[name]
        if chunk is None and world.is_main:
            mine[name] = _copy(tensor)
        elif chunk is not None and chunk.begin < chunk.end:
            mine[name] = _copy(tensor)
            rows[name] = (chunk.begin, tensor.shape[0])
    return {f"{part}-{number + 1:05d}-of-{num_chunks:05d}.safetensors": TensorFile(tensors=mine, rows=rows)}


def is_shared(tensors: Iterable[Tensor]) -> bool:
    """Return whether several ranks write files of a part."""
    return any(chunk_of(tensor) is not None for tensor in tensors)


class Piece(NamedTuple):
    """A tensor of one file: all of it, or some rows."""

    begin: int  # its first row
    num_rows: int | None  # of the whole tensor; None if this is all of it
    content: Any  # the library's slice, which reads nothing until it is asked


class SavedTensor:
    """A tensor in the files of a checkpoint. `saved[begin:end]` reads these rows alone, `saved[...]` all of it."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece.begin)
        self._num_rows = self._pieces[0].num_rows

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        shape = self._pieces[0].content.get_shape()
        return torch.Size(shape if self._num_rows is None else [self._num_rows, *shape[1:]])

    def is_complete(self) -> bool:
        """Return whether each row is there once."""
        if self._num_rows is None:
            return len(self._pieces) == 1
        ends = [0, *map(_end, self._pieces)]
        return [piece.begin for piece in self._pieces] == ends[:-1] and ends[-1] == self._num_rows

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        """Read into memory of its own: what the library returns is the mapped file."""
        if self._num_rows is None:
            return cast("Tensor", self._pieces[0].content[rows]).clone()
        begin, end, _ = (rows if isinstance(rows, slice) else slice(None)).indices(self._num_rows)
        found = [
            p.content[max(begin, p.begin) - p.begin : min(end, _end(p)) - p.begin]
            for p in self._pieces
            if begin < _end(p) and end > p.begin
        ]
        return torch.cat(found) if found else cast("Tensor", self._pieces[0].content[0:0]).clone()


def open_tensors(checkpoint_dir: Path, part: str) -> dict[str, SavedTensor]:
    """Return the tensors of a part (`model`, `ema`, `optimizer`), still on disk. Verify the checkpoint first.

    Raises:
        UserError: the checkpoint has no such part.
        IntegrityError: chunks are missing.
    """
    pieces: dict[str, list[Piece]] = {}
    for path in _files_of(checkpoint_dir, part):
        try:
            file = safe_open(path, framework="pt")
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                begin, num_rows = rows.get(name, (0, None))
                pieces.setdefault(name, []).append(Piece(begin, num_rows, file.get_slice(name)))
        except (SafetensorError, ValueError, TypeError) as error:
            raise IntegrityError(f"{path}: unreadable ({error})") from error
    found = {name: SavedTensor(pieces[name]) for name in pieces}
    if lost := sorted(name for name, tensor in found.items() if not tensor.is_complete()):
        raise IntegrityError(f"{checkpoint_dir}: {part} lacks rows of {', '.join(lost[:10])}")
    return found


def part_of(file_name: str) -> str:
    """Return the part that a file of tensors belongs to."""
    match = _CHUNK_NAME.fullmatch(file_name)
    return match[1] if match else file_name.removesuffix(".safetensors")


def has_part(checkpoint_dir: Path, part: str) -> bool:
    """Return whether a checkpoint has files of a part."""
    return (checkpoint_dir / f"{part}.safetensors").is_file() or bool(_chunk_files(checkpoint_dir, part))


def _files_of(checkpoint_dir: Path, part: str) -> list[Path]:
    path = checkpoint_dir / f"{part}.safetensors"
    if path.is_file():
        return [path]
    chunks = _chunk_files(checkpoint_dir, part)
    if not chunks:
        raise UserError(f"{checkpoint_dir}: no {path.name} in this checkpoint")
    count = int(chunks[0].name.removesuffix(".safetensors").rpartition("-")[2])
    if [c.name for c in chunks] != [f"{part}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]:
        raise IntegrityError(f"{checkpoint_dir}: {len(chunks)} of {count} chunks of {part} are there")
    return chunks


def _chunk_files(checkpoint_dir: Path, part: str) -> list[Path]:
    matches = ((path, _CHUNK_NAME.fullmatch(path.name)) for path in checkpoint_dir.iterdir())
    return sorted(path for path, match in matches if match and match[1] == part)


def _end(piece: Piece) -> int:
    return piece.begin + int(piece.content.get_shape()[0])


def _copy(tensor: Tensor) -> Tensor:
    return own_part(tensor.detach()).to("cpu", copy=True)
