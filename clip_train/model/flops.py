"""Arithmetic of the towers, counted from the config: what a pair costs, whatever computes it.

Counted is the architecture as published, 2 FLOP per multiply-add: all positions of all blocks and of the attention
pool. That ours compute only the position that is read is not subtracted, nor is recomputation added. A model of timm is
counted by torch, once, on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clip_train.model.config import ModelConfig, VisionConfig


def image_flops(config: ModelConfig, *, training: bool = False) -> int:
    """Return the FLOP of the image tower's forward pass on one image; in training without the dropped patches."""
    vision = config.vision
    if vision.timm is not None:
        settings = tuple((key, value) for key, value in asdict(vision).items() if key != "resnet_stages")
        return _timm_flops(settings, config.embed_dim, patch_dropout=config.patch_dropout if training else 0.0)
    if vision.resnet_stages:
        return _resnet_flops(config)
    num_patches = (vision.image_size // vision.patch_size) ** 2
    if training and config.patch_dropout > 0:
        num_patches = max(1, int(num_patches * (1 - config.patch_dropout)))
    embedding = 2 * 3 * vision.patch_size**2 * vision.width * num_patches
    hidden = int(vision.width * vision.mlp_ratio)
    blocks = vision.layers * _block_flops(1 + num_patches, vision.width, hidden=hidden)
    return embedding + blocks + 2 * vision.width * config.embed_dim


def text_flops(config: ModelConfig, *, lengths: Sequence[int]) -> int:
    """Return the FLOP of the text tower's forward pass on captions of these numbers of tokens.

    Padding is counted where the tower sees it.
    """
    text = config.text
    if text.sees_padding:
        lengths = [text.context_length] * len(lengths)
    num_tokens, num_pairs_of_tokens = sum(lengths), sum(length * length for length in lengths)
    per_token = _block_flops(1, text.width, hidden=int(text.width * text.mlp_ratio)) - 4 * text.width
    blocks = text.layers * (per_token * num_tokens + 4 * text.width * num_pairs_of_tokens)
    return blocks + 2 * text.width * config.embed_dim * len(lengths)


def training_flops(config: ModelConfig, *, lengths: Sequence[int]) -> int:
    """Return the FLOP of a training step on pairs whose captions have these numbers of tokens: three forward passes.

    An image tower whose features are cached is not run.
    """
    images = 0 if config.vision.cache_features else image_flops(config, training=True) * len(lengths)
    return 3 * (images + text_flops(config, lengths=lengths))


def _block_flops(length: int, width: int, *, hidden: int) -> int:
    projections = 2 * length * (4 * width * width + 2 * width * hidden)
    return projections + 4 * length * length * width


def _resnet_flops(config: ModelConfig) -> int:
    vision = config.vision
    width, side = vision.width, vision.image_size // 2
    half = width // 2
    total = 2 * 9 * side**2 * (3 * half + half * half + half * width)  # the stem, its first convolution strided
    side //= 2
    inputs = width
    for stage, num_blocks in enumerate(vision.resnet_stages):
        planes = width * 2**stage
        for block in range(num_blocks):
            stride = 2 if stage and not block else 1
            total += 2 * side**2 * (inputs * planes + 9 * planes * planes)
            side //= stride
            total += 2 * side**2 * planes * 4 * planes
            if stride > 1 or inputs != 4 * planes:
                total += 2 * side**2 * inputs * 4 * planes
            inputs = 4 * planes
    length = side**2 + 1
    pool = 6 * length * inputs**2 + 4 * length**2 * inputs + 2 * length * inputs * config.embed_dim
    return total + pool


@functools.cache
def _timm_flops(settings: tuple[tuple[str, Any], ...], embed_dim: int, *, patch_dropout: float) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from clip_train.model.timm_encoder import TimmEncoder

    vision = VisionConfig(**dict(settings))
    size = vision.image_size
    with torch.device("meta"):
        tower = TimmEncoder(ModelConfig(embed_dim=embed_dim, vision=vision, patch_dropout=patch_dropout))
        image = torch.empty(1, 3, size, size)
    tower.to("meta").train(patch_dropout > 0)
    # The counter knows attention by its matrix products only, and not those of kernels for inference.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        tower(image)
    return int(counter.get_total_flops())
