"""Spread one model over the ranks: compile its blocks, then wrap it in DDP or shard it with FSDP2.

The two scalars of a CLIP model, temperature and bias, stay outside: FSDP2 cannot shard a scalar, and a wrapper would
wait for a gradient that micro-batches do not have. They are averaged explicitly, once a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_train.distributed.batch_norm import batch_norms, synchronize_batch_norms
from clip_train.distributed.collectives import all_reduce, broadcast
from clip_train.distributed.shards import is_sharded
from clip_train.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from clip_train.distributed.world import World
    from clip_train.types import Features

SCALARS = ("logit_scale", "logit_bias")
# torch 2.13 renamed the argument and warns of the old name; 2.11 knows only the old one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
_BLOCK_LISTS = ("resblocks", "blocks")
SHORT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parallelize(
    model: nn.Module,
    *,
    world: World,
    strategy: str = "ddp",
    precision: str = "fp32",
    shard_ranks: int | None = None,
    compile_blocks: bool = False,
    cpu_offload: bool = False,
    gradient_type: str = "fp32",
    sync_batch_norm: bool = False,
) -> nn.Module:
    """Return what to call in place of `model`, which is on its device, to train it. Called by every rank.

    Rank 0's weights become those of all. The model's own object keeps its state-dict keys; `fsdp` shards it in place,
    so make the optimizer afterwards.

    strategy: `ddp` or `fsdp`.
    precision: type in which `fsdp` gathers and multiplies parameters.
    shard_ranks: `fsdp` shards over so many neighbouring ranks and replicates these groups; all ranks by default.
    compile_blocks: compile each transformer block by itself; equal blocks share one compilation.
    cpu_offload: `fsdp` keeps what it shards in the host's memory.
    gradient_type: type in which gradients travel and are summed, `fp32` or `bf16`.
    sync_batch_norm: batch norms take their statistics over all ranks.

    Raises:
        UserError: `ddp` is to send bf16 without nccl, or batch norms cannot be synchronised.
    """
    if sync_batch_norm:
        synchronize_batch_norms(model, world=world)
    if compile_blocks:
        compile_each_block(model)
    if strategy == "ddp":  # FSDP2 refuses parameters that are not contiguous
        channels_last_(model)
    if world.size == 1:
        return model
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            broadcast(value.detach(), world=world)
    if strategy == "fsdp":
        return _shard(
            model, world=world, precision=precision, shard_ranks=shard_ranks or world.size, cpu_offload=cpu_offload,
            gradient_type=gradient_type,
        )  # fmt: skip
    assert strategy == "ddp", strategy
    # DDP looks up a root parameter under its name in one place and under "." + name in another.
    ignored = [prefix + name for name in _scalars(model) for prefix in ("", ".")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False, **_NO_BUFFER_SYNC)
    if gradient_type == "bf16":
        _send_bf16(wrapped)
    return wrapped


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of both towers."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential):
            yield from module


def compile_each_block(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every block by itself, in place. Equal blocks share their compilations.

    The first shape is compiled as it is, the second for any size: however many lengths and batch sizes come, a block
    has a handful of compilations. A graph break is an error.
    """
    # Blocks of both towers, with and without gradients, count together. Past the limit torch would raise an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer_blocks(model):
        block.compile(fullgraph=True, backend=backend)


def channels_last_(model: nn.Module) -> None:
    """Lay out convolutions as they are multiplied and their gradients come, in place; a patch embedding stays."""
    for tower in model.children():
        if sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > 1:
            tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradient_sync(wrapped: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Return a context for one forward and backward pass that averages gradients over ranks, or leaves them local."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if enabled else wrapped.no_sync()
    if any(is_sharded(p) for p in wrapped.parameters()):
        sharded = cast("FSDPModule", wrapped)
        sharded.set_requires_gradient_sync(enabled)
        sharded.set_is_last_backward(enabled)
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Let a rank of `fsdp` hold its part of every parameter again: after encoding it keeps those outside of blocks."""
    if any(is_sharded(p) for p in model.parameters()):
        cast("FSDPModule", model).reshard()


@torch.no_grad()
def average_scalars(model: nn.Module, *, world: World, with_them: list[Tensor]) -> list[Tensor]:
    """Average the gradients of the model's scalars over the ranks in place, and the 0-d tensors `with_them` on the way.

    Called by every rank, after backward; one collective for all. Returns the averages of `with_them`.
    """
    gradients = [p.grad for p in (model.get_parameter(name) for name in _scalars(model)) if p.grad is not None]
    mean = all_reduce(torch.stack([t.double() for t in (*gradients, *with_them)]), world=world) / world.size
    for gradient, value in zip(gradients, mean, strict=False):
        gradient.copy_(value)
    return list(mean[len(gradients) :])


def _scalars(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(recurse=False) if name in SCALARS]


def _send_bf16(wrapped: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    if dist.get_backend() != "nccl":
        raise UserError(
            f"distributed.gradient_type=bf16 with strategy=ddp needs nccl, not {dist.get_backend()}; "
            "distributed=fsdp can do it on any"
        )
    wrapped.register_comm_hook(None, bf16_compress_hook)


def _shard(
    model: nn.Module, *, world: World, precision: str, shard_ranks: int, cpu_offload: bool, gradient_type: str
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if shard_ranks == world.size:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        shape = (world.size // shard_ranks, shard_ranks)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    short = SHORT_TYPES.get(precision)
    sums = torch.bfloat16 if gradient_type == "bf16" else (torch.float32 if short else None)
    policy = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=sums)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cpu_offload else OffloadPolicy()
    ignored = {model.get_parameter(name) for name in _scalars(model)}
    # FSDP2 hangs a hook on each tensor that a module returns; on a parameter itself the hooks would pile up.
    model.register_forward_hook(_copy_scalars)
    # Batch norms stay in float32, as under autocast: their running statistics are. One group: they are small and many.
    if short and (norms := [norm for norm in batch_norms(model) if norm.affine]):
        fully_shard(
            cast("list[nn.Module]", norms), mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=sums),
            offload_policy=offload,
        )  # fmt: skip
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=ignored)
    for method in ("encode_image", "encode_text", "pool_image"):
        register_fsdp_forward_method(model, method)
    return model


def _copy_scalars(model: nn.Module, inputs: object, features: Features) -> Features:
    bias = features.logit_bias
    return features._replace(
        logit_scale=features.logit_scale.clone(), logit_bias=None if bias is None else bias.clone()
    )
