"""Choices of `distributed.*`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.distributed.world import World


class Strategy(StrEnum):
    ddp = "ddp"


class Backend(StrEnum):
    auto = "auto"
    nccl = "nccl"
    gloo = "gloo"


@dataclass(slots=True, kw_only=True)
class DistributedConfig:
    """How the ranks of one run work together. Ranks come from torchrun's environment variables."""

    strategy: Strategy = Strategy.ddp
    """`ddp`: every rank holds the whole model, gradients are averaged."""
    backend: Backend = Backend.auto
    """`auto` takes nccl on CUDA and gloo on CPU."""
    timeout_seconds: float = 300.0
    """A collective that waits longer than this fails, naming the ranks."""

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise UserError(f"distributed.timeout_seconds={self.timeout_seconds} must be positive")

    def build(self, *, device: str) -> World:
        """Join the process group that the launcher describes, or stay alone without one."""
        from clip_train.distributed.world import start_world

        return start_world(device=device, backend=self.backend.value, timeout_seconds=self.timeout_seconds)
