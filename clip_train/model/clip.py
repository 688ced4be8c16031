"""CLIP: two towers, one embedding space, one temperature (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.model.config import ModelConfig
from clip_train.model.modified_resnet import ModifiedResNet
from clip_train.model.text_transformer import TextTransformer
from clip_train.model.timm_encoder import TimmEncoder
from clip_train.model.vision_transformer import VisionTransformer
from clip_train.types import Features

MAX_LOGIT_SCALE = math.log(100)


class CLIP(TextTransformer):
    """An image tower `visual`, and a text tower at the root, where the state-dict keys of OpenAI CLIP have it.

    Attributes:
        logit_scale: [] log of the inverse temperature.
        logit_bias: [] bias of the logits for sigmoid losses, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        # Modules that are never in training mode, whatever the model is in.
        self.locked: list[nn.Module] = []
        self.visual = _image_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        on_text: Callable[[Tensor], Tensor] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Features:
        """Embed one batch of pairs.

        Args:
            images: uint8 [B, H, W, 3], float [B, 3, H, W] or float [B, D], see `encode_image`.
            tokens: int64 [B, L].
            on_text: receives the text features [B, D] before the image tower runs, and returns them; a loss starts its
                gather here, so that the exchange happens behind the image tower.
            lengths: tokens of each caption, see `embed_text`.
        """
        text = _finish(self.embed_text(tokens, lengths), normalize=True)
        if on_text is not None:
            text = on_text(text)
        return Features(self.encode_image(images), text, self.logit_scale, self.logit_bias)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; locked modules stay in evaluation mode."""
        super().train(mode)
        for module in self.locked:
            module.train(False)
        return self

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed images, [B, D].

        Args:
            images: uint8 [B, H, W, 3] raw pixels, normalised here, or float [B, 3, H, W] already normalised; or what
                this returned for them before, float [B, D], which is returned.
            normalize: divide by the length, in float32 also under autocast.
        """
        return images if images.ndim == 2 else _finish(self.visual(images), normalize)

    def pool_image(self, images: Tensor) -> Tensor:
        """Return the image tower's features before the projection to the shared embedding, [B, width] in float32.

        Args:
            images: uint8 [B, H, W, 3] or float [B, 3, H, W], see `encode_image`.
        """
        return _finish(self.visual.pool(images), normalize=False)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed captions int64 [B, L], zero-padded after the end token, to [B, D], by default of unit length."""
        return _finish(self.embed_text(tokens), normalize)

    def load_timm_weights(self) -> None:
        """Replace the random weights of a timm image tower by timm's own, from the hub or its cache.

        Raises:
            UserError: there are none, or they are neither cached nor to be had.
        """
        assert isinstance(self.visual, TimmEncoder)
        self.visual.load_pretrained()

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the log inverse temperature in [0, ln 100], in place (call it after each optimizer step)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _image_tower(config: ModelConfig) -> VisionTransformer | ModifiedResNet | TimmEncoder:
    if config.vision.timm is not None:
        return TimmEncoder(config)
    return ModifiedResNet(config) if config.vision.resnet_stages else VisionTransformer(config)


def _finish(features: Tensor, normalize: bool) -> Tensor:
    if features.dtype != torch.float64:
        features = features.float()
    return F.normalize(features, dim=-1) if normalize else features
