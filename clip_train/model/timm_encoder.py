"""Any image model of timm as the image tower, with the pooling, projection and state-dict keys of open_clip."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, TimmPool, TimmProjection
from clip_train.model.pixels import pixel_normalisation

if TYPE_CHECKING:
    from clip_train.model.config import VisionConfig

_OVER_CONVOLUTIONS = (TimmPool.abs_attn, TimmPool.rot_attn)


class DataConfig(NamedTuple):
    """What timm says of a model's input."""

    image_size: int  # pixels
    mean: tuple[float, ...]  # [3]
    std: tuple[float, ...]  # [3]


def data_config(name: str) -> DataConfig:
    """Return timm's data config of a model, without building it.

    Raises:
        UserError: timm has no model of this name (the nearest names are given).
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise UserError(f"model.vision.timm={name}: timm has no such model; the nearest names are {', '.join(near)}")
    found = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return DataConfig(found.input_size[-1], tuple(found.mean), tuple(found.std))


class TimmEncoder(nn.Module):
    """Map square images to the shared embedding, not yet normalised: timm's model `trunk`, then `head`.

    Attributes:
        recomputes: whether the trunk recomputes its blocks in the backward pass.
    """

    pixel_scale: Tensor  # [3]
    pixel_shift: Tensor  # [3]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_resolution = config.vision.image_size
        self.trunk = _trunk(config, pretrained=False)
        self.head = _head(self.trunk, config)
        if torch.get_default_device().type == "meta" and _has_computed_buffers(self):
            # Tables that no file holds must have values even when the weights come later.
            with torch.device("cpu"):
                self.trunk = _trunk(config, pretrained=False)
                self.head = _head(self.trunk, config)
        has_batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.trunk.modules())
        # As for this library's ResNet: recomputing would count a batch twice in the running statistics.
        self.recomputes = config.checkpointing > 0 and not has_batch_norms
        scale, shift = pixel_normalisation(config)
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)
        if self.recomputes:
            self._recompute(True)  # now, so that a model that cannot says so at once

    def forward(self, images: Tensor) -> Tensor:
        """Embed images: uint8 [B, H, W, 3] raw pixels or float [B, 3, H, W] already normalised, to [B, D]."""
        features: Tensor = self.head(self._encode(images))
        return features

    def pool(self, images: Tensor) -> Tensor:
        """Return the features [B, width] before the projection; `images` as for `forward`."""
        features = self._encode(images)
        for name, layer in self.head.named_children():
            if name == "pool":
                features = layer(features)
        return features

    def _encode(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = torch.addcmul(self.pixel_shift, images, self.pixel_scale).permute(0, 3, 1, 2)
        if self.recomputes:
            self._recompute(self.training and torch.is_grad_enabled())
        features: Tensor = self.trunk(images.to(next(self.parameters()).dtype))
        return features

    def load_pretrained(self) -> None:
        """Replace the trunk's weights by timm's own; the projection to the shared embedding stays random.

        Raises:
            UserError: timm has none, or they are neither in the hub's cache nor to be had.
        """
        self.trunk.load_state_dict(_trunk(self.config, pretrained=True).state_dict())

    def _recompute(self, enabled: bool) -> None:
        try:
            cast("Any", self.trunk).set_grad_checkpointing(enabled)
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"model.checkpointing={self.config.checkpointing}: timm's {self.config.vision.timm} cannot recompute "
                "its blocks; take 0"
            ) from error


def _trunk(config: ModelConfig, *, pretrained: bool) -> nn.Module:
    """Build timm's model without classifier, pooled unless the head does that, for the config's image size."""
    import timm

    vision = config.vision
    name = str(vision.timm)
    usual = data_config(name)
    options: dict[str, Any] = {}
    if config.patch_dropout > 0:
        options["patch_drop_rate"] = config.patch_dropout
    if vision.timm_act is not None:
        options["act_layer"] = vision.timm_act
    pool: dict[str, Any] = {"global_pool": vision.timm_pool.value}
    if vision.timm_pool in _OVER_CONVOLUTIONS:
        pool = {"global_pool": ""}
    elif vision.timm_pool is TimmPool.own:
        pool = {}
    try:
        # open_clip's two ways, which differ in the norms that some models have: a trunk with a projection after it is
        # made for its own pooling first, one without is made for this one.
        if vision.timm_proj is TimmProjection.none and vision.timm_pool not in _OVER_CONVOLUTIONS:
            options |= {"num_classes": 0, **pool}
            trunk: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        else:
            trunk = timm.create_model(name, pretrained=pretrained, **options)
            cast("Any", trunk).reset_classifier(0, **pool)
        if vision.image_size != usual.image_size:
            _set_image_size(trunk, vision)
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        chosen = ", ".join(f"{key}={value!r}" for key, value in (options | pool).items())
        raise UserError(
            f"model.vision.timm={name} cannot be built with {chosen or 'its own settings'} and "
            f"model.vision.image_size={vision.image_size} ({type(error).__name__}: {error})"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"model.vision.pretrained=true: timm's weights of {name} are neither in the hub's cache nor downloadable "
            f"({str(error).splitlines()[0]}). Download them once where there is a network, or take "
            "model.vision.pretrained=false"
        ) from error
    return trunk


def _set_image_size(trunk: nn.Module, vision: VisionConfig) -> None:
    if hasattr(trunk, "set_input_size"):
        cast("Any", trunk).set_input_size(img_size=(vision.image_size, vision.image_size))
    elif cast("Any", trunk).default_cfg.get("fixed_input_size"):
        raise ValueError(f"the model takes images of {cast('Any', trunk).default_cfg['input_size'][-1]} pixels only")


def _head(trunk: nn.Module, config: ModelConfig) -> nn.Sequential:
    """Build open_clip's pooling and projection; the keys come from these names."""
    from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
    from timm.layers.mlp import Mlp

    vision, width = config.vision, int(cast("Any", trunk).num_features)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if vision.timm_pool in _OVER_CONVOLUTIONS:
        grid = cast("Any", trunk).default_cfg.get("pool_size")
        if not grid:
            raise UserError(
                f"model.vision.timm_pool={vision.timm_pool} pools over convolutions; {vision.timm} has none: take map, "
                "token or avg"
            )
        if width % 64:
            raise UserError(
                f"model.vision.timm_pool={vision.timm_pool} has heads of 64 channels, which do not divide the {width} "
                f"of {vision.timm}; take avg"
            )
        if vision.timm_pool is TimmPool.abs_attn:
            layers["pool"] = AttentionPool2d(width, feat_size=grid, out_features=config.embed_dim)
        else:
            layers["pool"] = RotAttentionPool2d(width, out_features=config.embed_dim)
        width = config.embed_dim
    if vision.timm_proj is TimmProjection.linear:
        layers["proj"] = nn.Linear(width, config.embed_dim, bias=vision.timm_proj_bias)
    elif vision.timm_proj is TimmProjection.mlp:
        layers["mlp"] = Mlp(width, 2 * config.embed_dim, config.embed_dim, bias=(True, vision.timm_proj_bias))
    elif width != config.embed_dim:
        raise UserError(
            f"model.vision.timm_proj=none: {vision.timm} gives {width} channels, model.embed_dim={config.embed_dim}; "
            f"take model.embed_dim={width}, or timm_proj=linear"
        )
    return nn.Sequential(layers)


def _has_computed_buffers(tower: nn.Module) -> bool:
    saved = tower.state_dict().keys()
    return any(name not in saved for name, _ in tower.named_buffers())
