"""Batch norms over the images of all ranks, and over no image twice."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from clip_train.distributed.collectives import all_gather, all_reduce, broadcast, new_group
from clip_train.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

    from clip_train.distributed.world import World


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Normalise by the mean and variance of all ranks' images, which must be equally many on each.

    What torch.nn.SyncBatchNorm computes; that one runs on CUDA only, this one on any device. The parameters and
    running statistics are those of the norm that it replaces, under the same names, and so are the modules that such a
    norm of timm applies to its result (drop-out and activation).
    """

    def __init__(self, norm: nn.BatchNorm2d, *, world: World, group: dist.ProcessGroup | None) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum, device="meta")
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self._world, self._group = world, group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W] per channel. In training every rank calls it, with as many images."""
        x = self._over_all_ranks(x) if self.training else super().forward(x)
        for module in self.children():
            x = module(x)
        return x

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        gathered: Tensor = _Gather.apply(torch.stack([mean, variance]), self._world, self._group)  # [ranks, 2, C]
        means, variances = gathered.unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if self.track_running_stats:
            self._count(mean.detach(), variance.detach(), number=self._world.size * x.numel() // x.shape[1])
        gain = self.weight * (variance + self.eps).rsqrt()
        return ((exact - mean[:, None, None]) * gain[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _count(self, mean: Tensor, variance: Tensor, *, number: int) -> None:
        """Follow a batch of `number` values per channel in the running statistics, whose variance is unbiased."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * number / (number - 1)).to(self.running_var.dtype), self.momentum)


class _Gather(torch.autograd.Function):
    """Statistics of every rank; each receives the gradients that all ranks have for its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World, group: dist.ProcessGroup | None) -> Tensor:
        ctx.world, ctx.group = world, group
        return all_gather(own[None], world=world, group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        summed = all_reduce(gradient.contiguous(), world=ctx.world, group=ctx.group)
        return summed[ctx.world.rank], None, None


def synchronize_batch_norms(model: nn.Module, *, world: World) -> None:
    """Replace every batch norm of `model` by one over all ranks, in place. Called by every rank.

    Raises:
        UserError: there is none, or one of a kind that cannot be replaced.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    if not found:
        raise UserError("distributed.sync_batch_norm=true: the model has no batch norms; leave it out")
    group = new_group(world=world)
    for parent, name, child in found:
        if not _can_be_replaced(child):
            raise UserError(
                f"distributed.sync_batch_norm=true: the model's {type(child).__name__} cannot be synchronised, "
                "torch's BatchNorm2d and timm's BatchNormAct2d can"
            )
        setattr(parent, name, SyncBatchNorm2d(child, world=world, group=group))


def _can_be_replaced(norm: _BatchNorm) -> TypeGuard[nn.BatchNorm2d]:
    timm = sys.modules.get("timm.layers")  # importing it takes seconds; a model of timm's has done it
    kinds = (nn.BatchNorm2d, *([timm.BatchNormAct2d] if timm else []))
    return type(norm) in kinds and norm.affine and norm.momentum is not None


def share_statistics(model: nn.Module, *, states: Iterable[Mapping[str, Tensor]], world: World) -> None:
    """Give all ranks rank 0's buffers of `model`, in each of `states`, state dicts of it. Called by every rank.

    A rank's running statistics follow its own images unless batch norms are synchronised, and rank 0's are saved: an
    evaluation of what will be saved needs the same ones on all ranks.
    """
    for state in states:
        for name in [name for name, _ in model.named_buffers() if name in state]:
            broadcast(state[name], world=world)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of `model` that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def uncounted(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Leave running statistics as they are within; batches are still normalised by their own."""
    norms = list(norms)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
