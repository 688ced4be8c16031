"""What the ranks exchange. Every function is called by every rank, and with one process returns at once.

torch 2.13 renamed two collectives and warns of the old names; 2.11 knows only the old ones. The choice is made here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.distributed.world import World

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Return when the result may be read."""


class Done:
    """The collective of a single process: there was nothing to wait for."""

    def wait(self) -> None:
        """Return at once."""


class All:
    """Several collectives under way."""

    def __init__(self, works: Iterable[Work]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        """Return when all results may be read."""
        for work in self._works:
            work.wait()


def new_group(*, world: World) -> dist.ProcessGroup | None:
    """Return another process group of all ranks, whose collectives never queue behind those of the others."""
    if world.size == 1:
        return None
    return dist.new_group(timeout=world.timeout)  # of its own accord it would wait for half an hour


def all_gather_async(rows: Tensor, *, world: World, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Work]:
    """Start gathering `rows` [B, ...] of every rank into one [size * B, ...], in rank order. Carries no gradient."""
    rows = rows.detach().contiguous()
    if world.size == 1:
        return rows, Done()
    gathered = rows.new_empty((world.size * rows.shape[0], *rows.shape[1:]))
    return gathered, _all_gather(gathered, rows, group=group, async_op=True)


def all_gather(rows: Tensor, *, world: World, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather `rows` [B, ...] of every rank into one [size * B, ...], in rank order. Carries no gradient."""
    gathered, work = all_gather_async(rows, world=world, group=group)
    work.wait()
    return gathered


def reduce_scatter_async(rows: Tensor, *, world: World, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Work]:
    """Start summing `rows` [size * B, ...] over the ranks; this rank receives its own [B, ...]."""
    if world.size == 1:
        return rows, Done()
    own = rows.new_empty((rows.shape[0] // world.size, *rows.shape[1:]))
    return own, _reduce_scatter(own, rows.contiguous(), group=group, async_op=True)


def all_reduce(values: Tensor, *, world: World, op: str = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """Combine `values` over the ranks in place with `sum`, `max` or `min`, and return them."""
    if world.size > 1:
        dist.all_reduce(values, op=_OPS[op], group=group)
    return values


def ring_shift_async(values: Tensor, *, world: World, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Work]:
    """Start sending `values` to the next rank; what the previous rank sent arrives in the returned tensor.

    Keep `values` unchanged and alive until the work is done.
    """
    if world.size == 1:
        return values, Done()
    received = torch.empty_like(values)
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    operations = [
        dist.P2POp(dist.isend, values, group=group, group_peer=to),
        dist.P2POp(dist.irecv, received, group=group, group_peer=source),
    ]
    return received, All(dist.batch_isend_irecv(operations))


def broadcast(values: Tensor, *, world: World) -> Tensor:
    """Overwrite `values` with rank 0's on every rank, and return them."""
    if world.size > 1:
        dist.broadcast(values, src=0)
    return values


def broadcast_object(value: Any, *, world: World, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's `value` on every rank."""
    if world.size == 1:
        return value
    box = [value]
    device = world.device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    dist.broadcast_object_list(box, src=0, group=group, device=device)
    return box[0]


def gather_objects(value: Any, *, world: World, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def barrier(*, world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)
