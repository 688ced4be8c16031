"""Which rows of a tensor this rank holds, where FSDP2 spreads tensors over ranks by their first dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch

if TYPE_CHECKING:
    from types import EllipsisType

    from torch import Tensor
    from torch.distributed.tensor import DTensor


class Sliceable(Protocol):
    """A tensor, or one that is read from a file when it is asked for rows."""

    @property
    def shape(self) -> torch.Size:
        """Of all rows."""

    def __getitem__(self, rows: slice | EllipsisType, /) -> Tensor:
        """Return some rows, or with `...` all of them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of a sharded tensor that a rank holds."""

    begin: int
    end: int
    number: int  # from 0, in the order of the rows
    num_chunks: int  # that make the tensor; some may be empty
    is_first_copy: bool  # with `shard_ranks` several groups of ranks hold the same chunks: true in the first group


def is_sharded(value: Tensor) -> bool:
    """Return whether `value` is spread over ranks, a DTensor. Asks without importing its class, which takes seconds."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return `value` with the parts of all ranks. Called by every rank."""
    return cast("DTensor", value).full_tensor() if is_sharded(value) else value


def own_part(value: Tensor) -> Tensor:
    """Return what this rank holds of `value`: the rows of a sharded tensor, else all of it."""
    return cast("DTensor", value).to_local() if is_sharded(value) else value


def chunk_of(value: Tensor) -> Chunk | None:
    """Return which rows of a sharded tensor this rank holds; None if it holds all."""
    if not is_sharded(value):
        return None
    layout = cast("DTensor", value)
    mesh, place = layout.device_mesh, layout.device_mesh.get_coordinate()
    assert place is not None, "this rank is not among those that hold the tensor"
    found = None
    for dimension, placement in enumerate(layout.placements):
        if placement.is_shard():
            assert placement.is_shard(0) and found is None, f"sharded as FSDP2 does not: {layout.placements}"
            found = dimension
    if found is None:
        return None
    number, count, rows = place[found], mesh.size(found), value.shape[0]
    size = -(-rows // count)
    copies = [coordinate for dimension, coordinate in enumerate(place) if dimension != found]
    return Chunk(min(number * size, rows), min((number + 1) * size, rows), number, count, not any(copies))


@torch.no_grad()
def fill(target: Tensor, value: Sliceable) -> None:
    """Copy `value`, which has all rows, into `target`: a sharded one takes its own rows and reads no other."""
    own_part(target).copy_(_own_rows(value, chunk_of(target)))


def laid_out(value: Sliceable, *, like: Tensor) -> Tensor:
    """Return `value`, which has all rows, spread over ranks and devices as `like` is, in the same order in memory.

    Fused optimizers go through a parameter and its state in the order of the memory.
    """
    rows = _own_rows(value, chunk_of(like))
    own = torch.empty_like(own_part(like), dtype=rows.dtype, requires_grad=False).copy_(rows)
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    layout = cast("DTensor", like)
    return DTensor.from_local(
        own, layout.device_mesh, layout.placements, run_check=False, shape=value.shape, stride=like.stride()
    )


def _own_rows(value: Sliceable, chunk: Chunk | None) -> Tensor:
    return value[...] if chunk is None else value[chunk.begin : chunk.end]
