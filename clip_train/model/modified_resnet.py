"""The ResNet image tower of OpenAI CLIP: a three-convolution stem, antialiased strides and an attention pool."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.model.config import ModelConfig
from clip_train.model.pixels import pixel_normalisation

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual; a stride is an average pool, so that nothing aliases."""

    def __init__(self, inputs: int, planes: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        nn.init.zeros_(self.bn3.weight)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != planes * EXPANSION:
            self.downsample = nn.Sequential(
                OrderedDict(
                    {
                        "-1": nn.AvgPool2d(stride),
                        "0": nn.Conv2d(inputs, planes * EXPANSION, 1, bias=False),
                        "1": nn.BatchNorm2d(planes * EXPANSION),
                    }
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x))


class AttentionPool(nn.Module):
    """Attend from the mean of the grid to the mean and the grid, then project: [B, C, h, w] to [B, D]."""

    def __init__(self, grid: int, width: int, *, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return what is projected, [B, C]."""
        x = x.flatten(2).transpose(1, 2)  # [B, h * w, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            projection(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, C / heads]
            for projection, rows in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class ModifiedResNet(nn.Module):
    """Map square images to the shared embedding, not yet normalised. Initialised as in OpenAI CLIP."""

    pixel_scale: Tensor  # [3]
    pixel_shift: Tensor  # [3]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        width = vision.width
        self.input_resolution = vision.image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, num_blocks in enumerate(vision.resnet_stages):
            planes = width * 2**stage
            blocks = []
            for i in range(num_blocks):
                blocks.append(Bottleneck(inputs, planes, stride=2 if stage and not i else 1))
                inputs = planes * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(vision.image_size // 32, inputs, heads=vision.heads, embed_dim=config.embed_dim)
        scale, shift = pixel_normalisation(config)
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images: uint8 [B, H, W, 3] raw pixels or float [B, 3, H, W] already normalised, to [B, D]."""
        return self.attnpool(self._grid(images))

    def pool(self, images: Tensor) -> Tensor:
        """Return the features [B, width] before the projection; `images` as for `forward`."""
        return self.attnpool.attend(self._grid(images))

    def _grid(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = torch.addcmul(self.pixel_shift, images, self.pixel_scale).permute(0, 3, 1, 2)
        x = images.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(stage)(x)
        return x
