"""The SigLIP models of transformers: config and tensors as this library's towers, the image tower being timm's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, TextConfig, TextPool, TimmPool, TimmProjection, VisionConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

# What transformers leaves out of config.json is at these values.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "pad_token_id": 1,
}  # fmt: skip
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "vision_use_head": True,
}  # fmt: skip
# timm's name for each size: (width, layers, heads, hidden channels of the MLP).
_SIZES = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_ROOT = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
}
_LAYERS = {
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_model.head",
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
}
_TEXT_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_TIMM_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_POOL_PROJECTION = "vision_model.head.attention.in_proj"


def build_config(text: Mapping[str, Any], vision: Mapping[str, Any], *, name: str, origin: str) -> ModelConfig:
    """Return the architecture of a `config.json` with `model_type: siglip`, its sections completed by the defaults.

    Raises:
        UserError: the config asks for something that the towers here do not have.
    """
    for section, values, key, accepted in (
        ("text_config", text, "hidden_act", tuple(_ACTIVATIONS)),
        ("vision_config", vision, "hidden_act", tuple(_ACTIVATIONS)),
        ("vision_config", vision, "layer_norm_eps", (1e-6,)),
        ("vision_config", vision, "num_channels", (3,)),
        ("vision_config", vision, "vision_use_head", (True,)),
        ("text_config", text, "projection_size", (vision["hidden_size"], None)),
    ):
        if values.get(key) not in accepted:
            rule = " or ".join(repr(value) for value in accepted)
            raise UserError(f"{origin}: {section}.{key}={values[key]!r} has no counterpart here, it must be {rule}")
    pad_id = text["pad_token_id"]
    return ModelConfig(
        name=name,
        embed_dim=vision["hidden_size"],
        vision=VisionConfig(
            image_size=vision["image_size"],
            timm=_timm_name(vision, origin=origin),
            timm_pool=TimmPool.map,
            timm_proj=TimmProjection.none,
            timm_act=_ACTIVATIONS[vision["hidden_act"]],
        ),
        text=TextConfig(
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_ratio=text["intermediate_size"] / text["hidden_size"],
            causal=False,
            pool=TextPool.last,
            pad_id=pad_id if pad_id < text["vocab_size"] else 0,
            proj_bias=True,
            norm_eps=text["layer_norm_eps"],
            gelu_tanh=text["hidden_act"] == "gelu_pytorch_tanh",
        ),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        squash=True,
        init_logit_bias=-10.0,
    )


def to_native(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and reshape the tensors of transformers' `SiglipModel`; what has no native name keeps its own."""
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    native = {ours: left.pop(theirs) for ours, theirs in _renamed(left, config) if theirs in left}
    for ours, parts in _stacked(left, config):
        if left.keys() >= set(parts):
            native[ours] = torch.cat([left.pop(part) for part in parts])
    if _POSITIONS in left:
        native["visual.trunk.pos_embed"] = left.pop(_POSITIONS)[None]
    for kind in ("weight", "bias"):
        if (stacked := left.pop(f"{_POOL_PROJECTION}_{kind}", None)) is not None:
            query, key_and_value = stacked.split([len(stacked) // 3, 2 * len(stacked) // 3])
            native[f"visual.trunk.attn_pool.q.{kind}"] = query
            native[f"visual.trunk.attn_pool.kv.{kind}"] = key_and_value
    return native | left


def _renamed(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield (native, transformers') names of tensors that are the same in both."""
    yield from list(_ROOT.items())
    layers = list(_LAYERS.items())
    for ours, theirs, parts in _blocks(tensors, config):
        layers += [(f"{ours}.{our_part}", f"{theirs}.{their_part}") for our_part, their_part in parts.items()]
    for ours, theirs in layers:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _stacked(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield the native name of stacked query, key and value, and transformers' three names."""
    for ours, theirs, parts in _blocks(tensors, config):
        for kind in ("weight", "bias"):
            own = f"{ours}.attn.qkv.{kind}" if parts is _TIMM_BLOCK else f"{ours}.attn.in_proj_{kind}"
            yield own, [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]


def _blocks(tensors: Mapping[str, Tensor], config: ModelConfig) -> list[tuple[str, str, dict[str, str]]]:
    """Return (native, transformers') names of the blocks and their parts; timm's depth is read off the names."""
    text = [
        (f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", _TEXT_BLOCK) for i in range(config.text.layers)
    ]
    prefix = "vision_model.encoder.layers."
    found = {int(n.removeprefix(prefix).split(".", 1)[0]) for n in tensors if n.startswith(prefix)}
    return text + [(f"visual.trunk.blocks.{i}", f"{prefix}{i}", _TIMM_BLOCK) for i in sorted(found)]


def _timm_name(vision: Mapping[str, Any], *, origin: str) -> str:
    """Return timm's model of these sizes, made for these pixels if there is one."""
    import timm

    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    size = _SIZES.get(tuple(vision[key] for key in keys))
    stem = f"vit_{size}_patch{vision['patch_size']}_siglip_"
    names = [name for name in timm.list_models(f"{stem}*") if name.removeprefix(stem).isdigit()]
    if not names:
        sizes = ", ".join(f"{key}={vision[key]}" for key in (*keys, "patch_size"))
        raise UserError(f"{origin}: timm has no SigLIP tower with vision_config {sizes}")
    wanted = f"{stem}{vision['image_size']}"
    return wanted if wanted in names else names[0]
