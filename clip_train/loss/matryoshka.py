"""Matryoshka embeddings: the first dimensions of an embedding are an embedding too (Kusupati et al. 2022, §3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from clip_train.loss.base import ContrastiveLoss
    from clip_train.types import Features


class MatryoshkaLoss:
    """The mean of a contrastive loss over the whole embedding and over its prefixes, each brought to unit length again.

    All sizes share temperature and bias. The gather of the whole text features still hides behind the image tower;
    those of the prefixes, smaller together than the whole for sizes that double, do not.
    """

    def __init__(self, loss: ContrastiveLoss, *, sizes: Sequence[int]) -> None:
        """Wrap `loss`. sizes: dimensions of each prefix, below that of the embedding."""
        self._loss, self._sizes = loss, sizes
        self._metrics: dict[str, Tensor] = {}
        self.needs_caption_ids = loss.needs_caption_ids

    def on_text(self, text: Tensor) -> Tensor:
        """Start gathering the whole text features, see `ContrastiveLoss.on_text`."""
        return self._loss.on_text(text)

    def __call__(
        self, features: Features, *, valid: Tensor | None = None, caption_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `{"contrastive_loss": []}`, see `ContrastiveLoss`. Called by every rank."""
        # The whole embedding first: it takes the gather that is under way.
        losses = [self._loss(features, valid=valid, caption_ids=caption_ids)["contrastive_loss"]]
        self._metrics = self._loss.metrics()
        for size in self._sizes:
            image, text = (F.normalize(rows[:, :size], dim=-1) for rows in (features.image, features.text))
            part = features._replace(image=image, text=text)
            losses.append(self._loss(part, valid=valid, caption_ids=caption_ids)["contrastive_loss"])
        return {"contrastive_loss": torch.stack(losses).mean()}

    def metrics(self) -> dict[str, Tensor]:
        """Return the metrics of the whole embedding in the last call."""
        return self._metrics
