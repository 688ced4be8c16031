"""Compare the weights of the ranks: copies of one model that differ in a bit train two models from then on.

Each rank hashes what it holds on its device; only the hashes travel. Under DDP every parameter is a copy. Under FSDP a
rank holds parts of its own, which have no copy to compare with, unless `distributed.shard_ranks` makes several groups
of ranks hold the same parts: these are compared then, and the temperature and bias, which are never sharded, always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from clip_train.distributed.collectives import gather_objects
from clip_train.distributed.shards import is_sharded, own_part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clip_train.distributed.world import World

CHUNK = 2**21  # elements hashed at a time, with 48 MiB of working memory
_FACTOR = -7046029254386353131  # odd, 64 bits (splitmix64's increment)


class Differing(NamedTuple):
    """Ranks that do not hold what the others hold."""

    ranks: list[int]
    tensor: str  # first that differs


@torch.no_grad()
def bit_hash(values: Tensor) -> Tensor:
    """Return a 64-bit hash [] int64 of the bits of a float32, float64, float16 or bfloat16 tensor, on its device.

    The sum of element bits times odd factors that differ by position, modulo 2^64: any change of a single element
    changes it, as an odd factor has an inverse.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(words).flatten()
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    factors = torch.arange(1, 2 * min(CHUNK, max(bits.numel(), 1)), 2, device=values.device) * _FACTOR
    for number, chunk in enumerate(bits.split(CHUNK)):
        part = (chunk.long() * factors[: chunk.numel()]).sum()
        total += part * (2 * number + 1)
    return total


def differing_ranks(model: nn.Module, *, world: World) -> Differing | None:
    """Return which ranks hold other weights than the ranks that should hold the same, None if all agree.

    Every rank calls it and gets the same answer. It waits for the device.
    """
    names, hashes, shared_by = [], [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        shared_by.append(_part_of(parameter) if is_sharded(parameter) else ())
        hashes.append(bit_hash(own_part(parameter)).to(world.device))
    ours = torch.stack(hashes).tolist()
    copied, parts = (_total(ours, shared_by, sharded=kind) for kind in (False, True))
    place = next(filter(None, shared_by), ())
    everyone: list[tuple[int, int, Any]] = gather_objects((copied, parts, place), world=world, group=world.host_group)
    suspects = _minority([(copied, ()) for copied, _, _ in everyone]) or _minority(
        [(parts, place) for _, parts, place in everyone]
    )
    if not suspects:
        return None
    details: list[tuple[list[int], list[Any]]] = gather_objects((ours, shared_by), world=world, group=world.host_group)
    for i, name in enumerate(names):
        if ranks := _minority([(all_hashes[i], places[i]) for all_hashes, places in details]):
            return Differing(ranks, name)
    raise AssertionError("hashes changed between two looks")


def _part_of(parameter: Tensor) -> tuple[int, ...]:
    """Return which part of a sharded parameter this rank holds: ranks with equal answers hold copies."""
    from torch.distributed.tensor import Shard

    layout = cast("Any", parameter)
    place = layout.device_mesh.get_coordinate()
    return (1, *(at for at, kind in zip(place, layout.placements, strict=True) if isinstance(kind, Shard)))


def _total(hashes: list[int], shared_by: list[tuple[int, ...]], *, sharded: bool) -> int:
    chosen = [h for h, place in zip(hashes, shared_by, strict=True) if bool(place) is sharded]
    return sum(h * (2 * i + 1) for i, h in enumerate(chosen)) % 2**64


def _minority(ranks: list[tuple[int, Any]]) -> list[int]:
    """Return the ranks whose hash is not the commonest among those at the same place; both of two that differ."""
    suspects: list[int] = []
    for place in {place for _, place in ranks}:
        members = {rank: h for rank, (h, where) in enumerate(ranks) if where == place}
        counts = sorted(((list(members.values()).count(h), h) for h in set(members.values())), reverse=True)
        if len(counts) == 1:
            continue
        tied = counts[0][0] == counts[1][0]
        suspects += [rank for rank, h in members.items() if tied or h != counts[0][1]]
    return sorted(suspects)
