"""The image tower: a vision transformer (Dosovitskiy et al. 2021) as in OpenAI CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.model.config import ModelConfig
from clip_train.model.pixels import pixel_normalisation
from clip_train.model.transformer import BlockStyle, Transformer


class VisionTransformer(nn.Module):
    """Map square images to the shared embedding, not yet normalised.

    The patch embedding is a matrix product on patches of NHWC pixels: the kernel of the equivalent convolution keeps
    its name and layout, `conv1.weight` [width, 3, P, P], and is viewed as [width, P * P * 3].
    """

    pixel_scale: Tensor  # [P * P * 3]
    pixel_shift: Tensor  # [P * P * 3]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.input_resolution = vision.image_size
        self.patch_size = vision.patch_size
        self.patch_dropout = config.patch_dropout
        scale = vision.width**-0.5
        num_patches = (vision.image_size // vision.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, stride=vision.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(vision.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width)
        self.transformer = Transformer(
            vision.width,
            layers=vision.layers,
            heads=vision.heads,
            style=BlockStyle(mlp_ratio=vision.mlp_ratio, quick_gelu=config.quick_gelu, layer_scale=vision.layer_scale),
            checkpointing=config.checkpointing,
        )
        self.ln_post = nn.LayerNorm(vision.width)
        self.proj = nn.Parameter(scale * torch.randn(vision.width, config.embed_dim))
        # Tiled to whole patches [P * P * 3], to multiply along contiguous memory.
        pixel_scale, pixel_shift = (values.repeat(vision.patch_size**2) for values in pixel_normalisation(config))
        self.register_buffer("pixel_scale", pixel_scale, persistent=False)
        self.register_buffer("pixel_shift", pixel_shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images: uint8 [B, H, W, 3] raw pixels or float [B, 3, H, W] already normalised, to [B, D]."""
        return self.pool(images) @ self.proj

    def pool(self, images: Tensor) -> Tensor:
        """Return the features [B, width] before the projection; `images` as for `forward`."""
        raw = images.dtype == torch.uint8
        if not raw:
            images = images.permute(0, 2, 3, 1)
        patches = self._patches(images)  # [B, patches, P * P * 3]
        positions = self.positional_embedding[1:]
        if self.training and self.patch_dropout > 0:
            kept = self._kept_patches(patches)  # [B, kept]
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
            positions = positions[kept]
        if raw:
            patches = torch.addcmul(self.pixel_shift, patches, self.pixel_scale)
        kernel = self.conv1.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches.to(kernel.dtype), kernel) + positions
        first = (self.class_embedding + self.positional_embedding[0]).to(x.dtype)
        x = torch.cat([first.expand(x.shape[0], 1, -1), x], dim=1)  # [B, T, width]
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x)

    def _patches(self, images: Tensor) -> Tensor:
        batch, height, width, _ = images.shape
        size = self.patch_size
        assert height == width == self.input_resolution, f"images are {height}x{width}, not {self.input_resolution}"
        grid = images.reshape(batch, height // size, size, width // size, size * 3)
        return grid.transpose(2, 3).reshape(batch, -1, size * size * 3)

    def _kept_patches(self, patches: Tensor) -> Tensor:
        batch, num_patches, _ = patches.shape
        kept = max(1, int(num_patches * (1 - self.patch_dropout)))
        return torch.rand(batch, num_patches, device=patches.device).topk(kept, sorted=False).indices
