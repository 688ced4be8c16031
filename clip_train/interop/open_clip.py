"""open_clip's model folders: `open_clip_config.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from clip_train.errors import UserError
from clip_train.model.config import (
    CLIP_MEAN,
    CLIP_STD,
    ModelConfig,
    TextConfig,
    TextPool,
    TimmPool,
    TimmProjection,
    VisionConfig,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Choice = TypeVar("Choice", TimmPool, TimmProjection)
CONFIG_FILE = "open_clip_config.json"
# open_clip's own order of preference, without transformers' names: their layout is another.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
# The fields that have a counterpart, with open_clip's defaults.
_MODEL = {"embed_dim": None, "quick_gelu": False, "vision_cfg": None, "text_cfg": None}
_VISION = {
    "image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0,
    "ls_init_value": None,
}  # fmt: skip
_TIMM = {"timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": False}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_TEXT_STYLE = {
    "no_causal_mask": False, "pool_type": "argmax", "eos_id": 2, "pad_id": 0, "proj_bias": False, "norm_kwargs": None,
    "act_kwargs": None,
}  # fmt: skip
_OPTIONAL = ("init_logit_scale", "init_logit_bias")
# Fields without one: harmless whatever they say about a model that otherwise fits, or harmless at these values.
_IRRELEVANT = {
    "attn_pooler_heads", "attn_pooler_queries", "custom_text", "final_ln_after_pool", "hf_model_pretrained",
    "hf_pooler_type", "hf_proj_type", "hf_tokenizer_name", "nonscalar_logit_scale", "output_tokens", "patch_dropout",
    "timm_drop", "timm_drop_path", "timm_model_pretrained", "tokenizer_kwargs",
}  # fmt: skip
_NEUTRAL = {
    "pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
    "block_type": ("default",),
}  # fmt: skip


def read_config(path: Path) -> ModelConfig:
    """Translate an `open_clip_config.json`.

    Raises:
        UserError: the file is damaged, or asks for something this library's towers do not have.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return translate(values["model_cfg"], values.get("preprocess_cfg", {}), name=path.parent.name, origin=str(path))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{path}: not a config of open_clip ({type(error).__name__}: {error})") from error


def read_cleaning(path: Path) -> str | None:
    """Return how captions are cleaned for the tokenizer beside this config, None if they go to open_clip's own."""
    text = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return None
    return str((text.get("tokenizer_kwargs") or {}).get("clean", "whitespace"))


def translate(model: dict[str, Any], preprocess: dict[str, Any], *, name: str, origin: str) -> ModelConfig:
    """Return the architecture that open_clip's `model_cfg` and `preprocess_cfg` describe.

    Raises:
        UserError: a key that this library has no counterpart for is set.
    """
    for section, values, known in (
        ("", model, {*_MODEL, *_OPTIONAL}),
        ("vision_cfg.", model["vision_cfg"], {*_VISION, *_TIMM}),
        ("text_cfg.", model["text_cfg"], {*_TEXT, *_TEXT_STYLE}),
    ):
        for key, value in values.items():
            understood = key in known or key in _IRRELEVANT or value in _NEUTRAL.get(key, ())
            if not understood and value not in (None, False):
                raise UserError(f"{origin}: no counterpart for model_cfg.{section}{key}={value!r}")
    for key, accepted in (("resize_mode", ("shortest", "squash")), ("interpolation", ("bicubic",))):
        if preprocess.get(key, accepted[0]) not in accepted:
            rule = " or ".join(accepted)
            raise UserError(f"{origin}: no counterpart for preprocess_cfg.{key}={preprocess[key]!r}, it must be {rule}")
    optional: dict[str, Any] = {
        "squash": preprocess.get("resize_mode") == "squash",
        "mean": list(preprocess.get("mean", CLIP_MEAN)), "std": list(preprocess.get("std", CLIP_STD)),
    }  # fmt: skip
    optional |= {key: float(model[key]) for key in _OPTIONAL if model.get(key) is not None}
    return ModelConfig(
        name=name,
        embed_dim=model["embed_dim"],
        quick_gelu=model.get("quick_gelu", False),
        vision=_vision(model["vision_cfg"], origin=origin),
        text=_text(model["text_cfg"], origin=origin),
        **optional,
    )


def _vision(given: dict[str, Any], *, origin: str) -> VisionConfig:
    vision: dict[str, Any] = _VISION | _TIMM
    vision |= {key: value for key, value in given.items() if key in vision}
    image_size = vision["image_size"]
    if isinstance(image_size, list):
        if len(set(image_size)) > 1:
            raise UserError(f"{origin}: model_cfg.vision_cfg.image_size={image_size} must be square")
        image_size = image_size[0]
    if vision["timm_model_name"]:
        return VisionConfig(
            image_size=image_size,
            timm=vision["timm_model_name"],
            timm_pool=_choice(TimmPool, vision["timm_pool"] or "own", key="vision_cfg.timm_pool", origin=origin),
            timm_proj=_choice(TimmProjection, vision["timm_proj"], key="vision_cfg.timm_proj", origin=origin),
            timm_proj_bias=vision["timm_proj_bias"],
        )
    sizes: dict[str, Any] = {key: vision[key] for key in ("patch_size", "layers", "mlp_ratio")}
    sizes["layer_scale"] = vision["ls_init_value"]
    is_resnet = isinstance(vision["layers"], list)
    return VisionConfig(
        image_size=image_size,
        width=vision["width"],
        heads=(32 if is_resnet else 1) * vision["width"] // vision["head_width"],
        **({"resnet_stages": vision["layers"]} if is_resnet else sizes),
    )


def _text(given: dict[str, Any], *, origin: str) -> TextConfig:
    style: dict[str, Any] = {key: given.get(key, usual) for key, usual in _TEXT_STYLE.items()}
    norm, activation = style["norm_kwargs"] or {}, style["act_kwargs"] or {}
    for key, found in (
        ("norm_kwargs", norm.keys() - {"eps"}),
        ("act_kwargs", activation.items() - {"approximate": "tanh"}.items()),
        ("pool_type", {style["pool_type"]} - {"argmax", "eos", "last"}),
    ):
        if found:
            raise UserError(f"{origin}: no counterpart for model_cfg.text_cfg.{key}={style[key]!r}")
    return TextConfig(
        **{key: given.get(key, usual) for key, usual in _TEXT.items()},
        causal=not style["no_causal_mask"],
        pool=TextPool.last if style["pool_type"] == "last" else TextPool.end,
        end_id=style["eos_id"] if style["pool_type"] == "eos" else None,
        pad_id=style["pad_id"],
        proj_bias=style["proj_bias"],
        norm_eps=norm.get("eps", 1e-5),
        gelu_tanh=bool(activation),
    )


def _choice(kind: type[Choice], value: str, *, key: str, origin: str) -> Choice:
    if value not in list(kind):
        raise UserError(f"{origin}: no counterpart for model_cfg.{key}={value!r}")
    return kind(value)


def second_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name native tensors as open_clip's `CustomTextCLIP` does, the text tower under `text.`; reading undoes it."""
    others = ("visual.", "logit_scale", "logit_bias")
    return {name if name.startswith(others) else f"text.{name}": tensor for name, tensor in tensors.items()}


def write_config(path: Path, *, config: ModelConfig, vocabulary: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write the `open_clip_config.json` of an architecture, the inverse of `read_config`.

    `model_cfg` becomes keyword arguments there, so it holds nothing that open_clip 3.3.0 does not know.

    Args:
        path: the new file.
        config: the architecture.
        vocabulary: further keys of `text_cfg` for a tokenizer other than CLIP's, of which open_clip has a copy.
    """
    model = model_cfg(config)
    model["text_cfg"] |= vocabulary
    preprocess = {
        "mean": list(config.mean), "std": list(config.std), "interpolation": "bicubic",
        "resize_mode": "squash" if config.squash else "shortest",
    }  # fmt: skip
    values = {"model_cfg": model, "preprocess_cfg": preprocess}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def model_cfg(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which open_clip builds the same architecture, those of its tokenizer apart."""
    model: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": _vision_cfg(config.vision),
        "text_cfg": _text_cfg(config.text),
    }
    if config.has_second_layout:
        model["custom_text"] = True
    if config.init_logit_bias is not None:
        model |= {key: getattr(config, key) for key in _OPTIONAL}
    return model


def _vision_cfg(vision: VisionConfig) -> dict[str, Any]:
    if vision.timm is not None:
        return {
            "image_size": vision.image_size,
            "timm_model_name": vision.timm,
            "timm_model_pretrained": False,
            "timm_pool": "" if vision.timm_pool is TimmPool.own else vision.timm_pool.value,
            "timm_proj": vision.timm_proj.value,
            "timm_proj_bias": vision.timm_proj_bias,
        }
    is_resnet = bool(vision.resnet_stages)
    tower: dict[str, Any] = {
        "image_size": vision.image_size,
        "layers": list(vision.resnet_stages) if is_resnet else vision.layers,
        "width": vision.width,
        "head_width": (32 if is_resnet else 1) * vision.width // vision.heads,
        "patch_size": None if is_resnet else vision.patch_size,
    }
    if not is_resnet and vision.mlp_ratio != _VISION["mlp_ratio"]:
        tower["mlp_ratio"] = vision.mlp_ratio
    if not is_resnet and vision.layer_scale is not None:
        tower["ls_init_value"] = vision.layer_scale
    return tower


def _text_cfg(text: TextConfig) -> dict[str, Any]:
    tower: dict[str, Any] = {key: getattr(text, key) for key in _TEXT}
    style = {
        "no_causal_mask": not text.causal,
        "pool_type": "last" if text.pool is TextPool.last else ("argmax" if text.end_id is None else "eos"),
        "eos_id": _TEXT_STYLE["eos_id"] if text.end_id is None else text.end_id,
        "pad_id": text.pad_id,
        "proj_bias": text.proj_bias,
        "norm_kwargs": None if text.norm_eps == TextConfig().norm_eps else {"eps": text.norm_eps},
        "act_kwargs": {"approximate": "tanh"} if text.gelu_tanh else None,
    }
    return tower | {key: value for key, value in style.items() if value != _TEXT_STYLE[key]}


def find_weights(folder: Path) -> Path:
    """Return the weight file beside `open_clip_config.json`.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has {CONFIG_FILE} but none of {', '.join(WEIGHT_FILES)}")
