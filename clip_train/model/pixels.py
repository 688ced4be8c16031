"""From the pixels of a picture to what an image tower takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.model.config import ModelConfig


def pixel_normalisation(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return factor and summand, each [3], that bring uint8 pixels to the mean and deviation of `config`.

    They are on the CPU also where parameters are built on the meta device: they come from no file.
    """
    mean, std = torch.tensor(config.mean, device="cpu"), torch.tensor(config.std, device="cpu")
    return 1 / (255 * std), -mean / std
