"""Choices of `loss=`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.loss.base import ContrastiveLoss
    from clip_train.loss.clip import ClipLoss
    from clip_train.loss.siglip import SigLipLoss


class Duplicates(StrEnum):
    negatives = "negatives"
    ignore = "ignore"


class Exchange(StrEnum):
    gather = "gather"
    ring = "ring"


@dataclass(slots=True, kw_only=True)
class LossConfig:
    """Fields that every loss has."""

    name: str = "???"
    duplicates: Duplicates = Duplicates.negatives
    """Equal captions elsewhere in the global batch: `negatives` treats them as mismatches, as published recipes do;
    `ignore` leaves them out."""

    def build(self, *, world: World) -> ContrastiveLoss:
        """Make the loss for the ranks of `world`. Called by every rank."""
        raise NotImplementedError

    def loss_of_guessing(self, num_pairs: int) -> float:
        """Return the least loss, over a batch of `num_pairs`, of a model whose logits are all equal."""
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class ClipLossConfig(LossConfig):
    """Symmetric InfoNCE with a learned temperature (CLIP, Radford et al. 2021, §2.3)."""

    name: str = "clip"

    def build(self, *, world: World) -> ClipLoss:
        """Make the loss for the ranks of `world`. Called by every rank."""
        from clip_train.loss.clip import ClipLoss

        return ClipLoss(world=world, ignore_duplicates=self.duplicates is Duplicates.ignore)

    def loss_of_guessing(self, num_pairs: int) -> float:
        """Return ln N."""
        return math.log(num_pairs)


@dataclass(slots=True, kw_only=True)
class SigLipLossConfig(LossConfig):
    """Pairwise sigmoid loss with a learned temperature and bias (SigLIP, Zhai et al. 2023, §3.2)."""

    name: str = "siglip"
    exchange: Exchange = Exchange.gather
    """`gather` brings the text features of all ranks to each behind the image tower; `ring` passes them from rank to
    rank during the loss and holds those of two ranks only."""

    def build(self, *, world: World) -> SigLipLoss:
        """Make the loss for the ranks of `world`. Called by every rank."""
        from clip_train.loss.siglip import SigLipLoss

        return SigLipLoss(
            world=world,
            ring=self.exchange is Exchange.ring,
            ignore_duplicates=self.duplicates is Duplicates.ignore,
        )

    def loss_of_guessing(self, num_pairs: int) -> float:
        """Return ln N + (N - 1) ln(N / (N - 1)): each pair is said to belong together with probability 1 / N."""
        others = num_pairs - 1
        return math.log(num_pairs) + (others * math.log1p(1 / others) if others else 0.0)
