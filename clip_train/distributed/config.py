"""Choices of `distributed.*`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from clip_train.distributed.world import World

START_FACTOR = 2.5  # of timeout_seconds until the first step is done
_CPP_COMPILERS = ("g++", "clang++")


class Strategy(StrEnum):
    ddp = "ddp"
    fsdp = "fsdp"


class GradientType(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


MOST_SECONDS = 10_000_000
"""The longest wait that can be set, four months: with ten times as long the system's clocks overflow."""


class Backend(StrEnum):
    auto = "auto"
    nccl = "nccl"
    gloo = "gloo"


@dataclass(slots=True, kw_only=True)
class DistributedConfig:
    """How the ranks of one run work together. The environment of torchrun, srun or mpirun says which they are."""

    strategy: Strategy = Strategy.ddp
    """`ddp`: every rank holds the whole model, gradients are averaged. `fsdp`: every rank holds a part of each
    parameter, its gradient and its optimizer state, for models that do not fit otherwise."""
    shard_ranks: int | None = None
    """With `fsdp`: ranks that share one copy of the model, as a divisor of all; null for all ranks. Set it to the ranks
    of one node, and nodes exchange gradients only."""
    cpu_offload: bool = False
    """With `fsdp` on CUDA: keep weights, gradients and optimizer state in the host's memory and update them there; a
    far slower step, for models that fit in no other way."""
    gradient_type: GradientType = GradientType.fp32
    """Type in which ranks exchange gradients: `bf16` halves the traffic and rounds each summand. With `ddp` on nccl
    only."""
    sync_batch_norm: bool = False
    """Batch norms of a ResNet take mean and variance over the images of all ranks, not of their own: worth its
    traffic where a rank, or its micro-batch, has few images."""
    backend: Backend = Backend.auto
    """`auto` takes nccl on CUDA and gloo on CPU."""
    arrival_seconds: float = 30.0
    """At the start the ranks wait so long for each other; then they fail, naming those that did not come. More where
    machines need minutes to load Python from a network disk, or are started by hand."""
    timeout_seconds: float = 120.0
    """A rank that waits longer than this for another in a step fails, naming the rank that is missing. Until the first
    step is done, as ranks may start and compile at their own pace, it waits 2.5 times as long."""

    def __post_init__(self) -> None:
        for key in ("arrival_seconds", "timeout_seconds"):
            if not 0 < getattr(self, key) <= MOST_SECONDS:
                raise UserError(f"distributed.{key}={getattr(self, key)} must be positive, and at most {MOST_SECONDS}")
        if self.shard_ranks is not None and (self.shard_ranks < 1 or self.strategy is not Strategy.fsdp):
            raise UserError(f"distributed.shard_ranks={self.shard_ranks} must be positive and go with strategy=fsdp")
        if self.cpu_offload and self.strategy is not Strategy.fsdp:
            raise UserError("distributed.cpu_offload=true needs distributed.strategy=fsdp")

    def build(self, *, device: str) -> World:
        """Join the process group that the launcher describes, or stay alone without one."""
        from clip_train.distributed.world import start_world

        return start_world(
            device=device,
            backend=self.backend.value,
            arrival_seconds=self.arrival_seconds,
            timeout_seconds=START_FACTOR * self.timeout_seconds,
            host_tensors=self.cpu_offload,
        )

    def parallelize(self, model: nn.Module, *, world: World, precision: str, compile_blocks: bool) -> nn.Module:
        """Return what to call in place of `model` to train it on all ranks. Called by every rank.

        Raises:
            UserError: an option does not go with the number of ranks, the device or the model.
        """
        from clip_train.distributed.parallel import parallelize

        if self.shard_ranks is not None and world.size % self.shard_ranks:
            raise UserError(f"distributed.shard_ranks={self.shard_ranks} must divide the {world.size} ranks")
        if self.cpu_offload and (world.device.type != "cuda" or world.size == 1):
            raise UserError("distributed.cpu_offload=true needs CUDA and several ranks")
        if compile_blocks and world.device.type == "cpu" and not any(map(shutil.which, _CPP_COMPILERS)):
            raise UserError(f"model.compile=true on a CPU needs a C++ compiler: {' or '.join(_CPP_COMPILERS)}")
        return parallelize(
            model,
            world=world,
            strategy=self.strategy.value,
            precision=precision,
            shard_ranks=self.shard_ranks,
            compile_blocks=compile_blocks,
            cpu_offload=self.cpu_offload,
            gradient_type=self.gradient_type.value,
            sync_batch_norm=self.sync_batch_norm,
        )
