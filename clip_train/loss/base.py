"""What every contrastive loss does around its mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clip_train.distributed.collectives import new_group
from clip_train.loss.exchange import Pairs, TextExchange, TextPort, gather_pairs

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.loss.ring import TextRing
    from clip_train.types import Features


class Loss(Protocol):
    """What a training step calls; `ContrastiveLoss` says how."""

    needs_caption_ids: bool

    def on_text(self, text: Tensor) -> Tensor:
        """Start gathering the text features [B, D] and return them."""

    def __call__(
        self, features: Features, *, valid: Tensor | None = None, caption_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `{"contrastive_loss": []}`."""

    def metrics(self) -> dict[str, Tensor]:
        """Return `{"in_batch_recall@1": []}` of the last call."""


class ContrastiveLoss(ABC):
    """A loss over the pairs of all ranks, from this rank's features.

    Two conventions, the same for every loss and number of ranks:

    *Value.* Each rank returns its share times the number of ranks: the mean over ranks is the loss of the global batch.
    *Gradient.* Each gradient is this rank's share of the global gradient times the number of ranks: DDP, FSDP2 and
    `average_scalars`, which average, give the gradient of the global loss.

    Features travel and are multiplied in autocast's type where autocast is on at the call, else in their own; logits
    and sums are float32 at least. Under autocast, therefore, call the model and the loss inside it.
    """

    def __init__(self, *, world: World, ignore_duplicates: bool) -> None:
        """Called by every rank: features get a process group of their own, so they never queue behind parameters."""
        self._world = world
        self._group = new_group(world=world)
        self._exchange: TextExchange | TextRing | None = None
        self._recall: Tensor | None = None
        self.needs_caption_ids = ignore_duplicates

    def on_text(self, text: Tensor) -> Tensor:
        """Start gathering the text features [B, D] and return them; pass this method to the model's forward.

        Called by every rank, and followed by one call of the loss with the returned features.
        """
        text, self._exchange = self._start(text)
        return text

    def __call__(
        self, features: Features, *, valid: Tensor | None = None, caption_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `{"contrastive_loss": []}`. Called by every rank, with the same arguments given.

        valid: [B] bool, False for padding rows, whose gradient is exactly zero. Unequal batches are padded to one size.
        caption_ids: [B] int64 from `caption_ids(tokens)`; needed if `needs_caption_ids`, else unused.
        """
        if self.needs_caption_ids and caption_ids is None:
            raise ValueError("loss.duplicates=ignore needs caption_ids")
        text = features.text
        if self._exchange is None:
            text = self.on_text(text)
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        with torch.autocast(features.image.device.type, enabled=False):
            pairs = gather_pairs(
                features.image,
                valid=valid,
                caption_ids=caption_ids if self.needs_caption_ids else None,
                world=self._world,
                group=self._group,
            )
            loss, recall = self._evaluate(features._replace(text=text), exchange, pairs)
        self._recall = recall.detach()
        return {"contrastive_loss": loss}

    def metrics(self) -> dict[str, Tensor]:
        """Return `{"in_batch_recall@1": []}` of the last call, as device tensors that average over ranks like the loss.

        The share of images that no caption of the global batch fits better than their own.
        """
        assert self._recall is not None, "metrics follow a call"
        return {"in_batch_recall@1": self._recall}

    def _start(self, text: Tensor) -> tuple[Tensor, TextExchange | TextRing]:
        exchange = TextExchange(text, world=self._world, group=self._group)
        return TextPort.apply(text, exchange), exchange

    @abstractmethod
    def _evaluate(self, features: Features, exchange: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return loss [] and in-batch recall [], both as shares."""
