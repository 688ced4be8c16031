"""Choices of `loss=`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.loss.clip import ClipLoss


@dataclass(slots=True, kw_only=True)
class LossConfig:
    """Fields that every loss has."""

    name: str = "???"


@dataclass(slots=True, kw_only=True)
class ClipLossConfig(LossConfig):
    """Symmetric InfoNCE with a learned temperature (CLIP, Radford et al. 2021, §2.3)."""

    name: str = "clip"

    def build(self, *, world: World) -> ClipLoss:
        """Make the loss for the ranks of `world`."""
        from clip_train.loss.clip import ClipLoss

        return ClipLoss(world=world)
