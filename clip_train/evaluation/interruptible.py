"""Leave an evaluation between two batches, on all ranks before the same one, when a rank is asked to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clip_train.distributed.collectives import all_gather
from clip_train.distributed.stop import StopReason
from clip_train.evaluation.features import WrappedEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from clip_train.distributed.world import World
    from clip_train.evaluation.features import DualEncoder


class Interrupted(Exception):
    """All ranks have left an evaluation, for the most urgent reason of any."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


def asker_of(model: DualEncoder) -> Callable[[], None]:
    """Return what long work without this model calls now and then, as often on every rank, so that it can be left."""
    while isinstance(model, WrappedEncoder):
        if isinstance(model, InterruptibleEncoder):
            return model.ask
        model = model.model
    return lambda: None


class InterruptibleEncoder(WrappedEncoder):
    """A model that before each batch asks all ranks whether one wants to stop.

    Every rank encodes equally many batches, so every rank asks equally often, and all leave before the same batch.

    Args:
        model: the model.
        wanted: why this rank should stop.
        world: the ranks.

    Raises:
        Interrupted: from any method that encodes, on every rank.
    """

    same_features = True

    def __init__(self, model: DualEncoder, *, wanted: Callable[[], StopReason], world: World) -> None:
        super().__init__(model)
        self._wanted, self._world = wanted, world

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of raw pixels [B, H, W, 3] uint8."""
        self.ask()
        return super().encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of tokens [B, L]."""
        self.ask()
        return super().encode_text(tokens, normalize=normalize)

    def pool_image(self, images: Tensor) -> Tensor:
        """Return features [B, width] of raw pixels before the projection to D dimensions."""
        self.ask()
        return super().pool_image(images)

    def ask(self) -> None:
        """Leave if a rank wants to. Every rank calls it as often."""
        own = torch.tensor([int(self._wanted())])
        reason = StopReason(int(all_gather(own, world=self._world, group=self._world.host_group).max()))
        if reason:
            raise Interrupted(reason)
