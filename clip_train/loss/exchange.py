"""Send text features to all ranks and bring their gradient home, both behind the image tower.

The order of one step, which autograd's rule "newer nodes first" gives by itself:
    text tower -> start gather -> image tower -> loss waits for the gather
    loss backward -> start reduce-scatter -> image tower backward -> wait -> text tower backward
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed.collectives import all_gather, all_gather_async, reduce_scatter_async

if TYPE_CHECKING:
    import torch.distributed as dist

    from clip_train.distributed.collectives import Work
    from clip_train.distributed.world import World


def wire_dtype(features: Tensor) -> torch.dtype:
    """Return the type in which features travel and are multiplied: autocast's where it is on, else their own."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


class TextExchange:
    """One step's text features on their way to all ranks, and their gradient on its way back."""

    def __init__(self, text: Tensor, *, world: World, group: dist.ProcessGroup | None) -> None:
        """Start gathering `text` [B, D] of every rank. Called by every rank."""
        self._world, self._group = world, group
        self._gathered, gather = all_gather_async(text.detach().to(wire_dtype(text)), world=world, group=group)
        self._gather = world.stalls.watch(gather, device=text.device)
        self._gradient: Tensor | None = None
        self._scale: Tensor | None = None
        self._scatter: Work | None = None
        self._sent: Tensor | None = None

    def rows(self) -> Tensor:
        """Return the text features of all ranks [G, D], waiting for them if need be."""
        self._gather.wait()
        return self._gathered

    def start_scatter(self, gradient: Tensor) -> None:
        """Start summing `gradient` [G, D] over the ranks, each receiving its own rows. Called by every rank."""
        self._sent = gradient  # kept alive until it has been sent
        self._gradient, scatter = reduce_scatter_async(gradient, world=self._world, group=self._group)
        self._scatter = self._world.stalls.watch(scatter, device=gradient.device)

    def set_scale(self, scale: Tensor) -> None:
        """Multiply the gradient by `scale` [] when it is handed out: cheaper on own rows than on all."""
        self._scale = scale

    def gradient(self) -> Tensor:
        """Return the gradient of this rank's text features [B, D], waiting for it if need be."""
        assert self._gradient is not None and self._scale is not None and self._scatter is not None
        self._scatter.wait()
        self._sent = None
        arrived = self._gradient
        if not graph_is_kept():
            self._gradient = None
        return scaled(arrived, self._scale)


class TextPort(torch.autograd.Function):
    """Identity whose backward pass waits for the gradient that `TextExchange` brings home.

    The loss hands back zeros without memory as the gradient of the text features, and the port adds what arrived.
    So another use of the text features stays right; only a tensor hook between port and loss sees zeros.
    """

    @staticmethod
    def forward(ctx: Any, text: Tensor, exchange: TextExchange) -> Tensor:
        ctx.exchange = exchange
        return text.clone()  # not a view: FSDP2 hangs hooks on what the model returns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gradient().to(gradient.dtype).add_(gradient), None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return `gradient` [B, D] times `factor` [], in place unless another backward pass will ask for it again."""
    return gradient * factor if graph_is_kept() else gradient.mul_(factor)


def graph_is_kept() -> bool:
    """Return whether the backward pass under way keeps the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def no_gradient_yet(features: Tensor) -> Tensor:
    """Return zeros shaped like `features` that take no memory: the loss's gradient for a port."""
    return features.new_zeros(()).expand(features.shape)


class Pairs(NamedTuple):
    """Which of the pairs count, here and on all ranks."""

    valid: Tensor | None  # [B] bool, False for padding rows
    all_valid: Tensor | None  # [G] bool
    ids: Tensor | None  # [B] int64, equal for equal captions
    all_ids: Tensor | None  # [G] int64
    num_valid: Tensor  # [] pairs that count on all ranks, at least 1


def gather_pairs(
    features: Tensor,
    *,
    valid: Tensor | None,
    caption_ids: Tensor | None,
    world: World,
    group: dist.ProcessGroup | None,
) -> Pairs:
    """Exchange padding flags and caption ids, 9 bytes a pair. Called by every rank, with the same arguments given.

    features: [B, D], for number and device. The result's `num_valid` has the type in which the loss accumulates.
    """

    def gathered(rows: Tensor) -> Tensor:
        return world.stalls.count(lambda: all_gather(rows, world=world, group=group), device=rows.device)

    accumulated = torch.promote_types(features.dtype, torch.float32)
    all_valid = all_ids = None
    if valid is None:
        num_valid = torch.full((), world.size * len(features), dtype=accumulated, device=features.device)
    else:
        all_valid = gathered(valid.to(torch.uint8)).bool()
        num_valid = all_valid.sum().clamp(min=1).to(accumulated)
    if caption_ids is not None:
        all_ids = gathered(caption_ids)
    return Pairs(valid, all_valid, caption_ids, all_ids, num_valid)
