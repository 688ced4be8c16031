"""open_clip's model folders: `open_clip_config.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, TextConfig, VisionConfig

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
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
_OPTIONAL = ("init_logit_scale", "init_logit_bias")
# Fields without one: harmless whatever they say about a model that otherwise fits, or harmless at these values.
_IRRELEVANT = {
    "attn_pooler_heads", "attn_pooler_queries", "custom_text", "eos_id", "final_ln_after_pool", "hf_model_pretrained",
    "hf_pooler_type", "hf_proj_type", "nonscalar_logit_scale", "output_tokens", "pad_id", "patch_dropout", "timm_drop",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
}  # fmt: skip
_NEUTRAL = {
    "pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
    "block_type": ("default",), "mlp_ratio": (4.0,),
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


def translate(model: dict[str, Any], preprocess: dict[str, Any], *, name: str, origin: str) -> ModelConfig:
    """Return the architecture that open_clip's `model_cfg` and `preprocess_cfg` describe.

    Raises:
        UserError: a key that this library has no counterpart for is set.
    """
    for section, values, known in (
        ("", model, {*_MODEL, *_OPTIONAL}),
        ("vision_cfg.", model["vision_cfg"], _VISION),
        ("text_cfg.", model["text_cfg"], _TEXT),
    ):
        for key, value in values.items():
            understood = key in known or key in _IRRELEVANT or value in _NEUTRAL.get(key, ())
            if not understood and value not in (None, False):
                raise UserError(f"{origin}: no counterpart for model_cfg.{section}{key}={value!r}")
    vision = _VISION | {key: value for key, value in model["vision_cfg"].items() if key in _VISION}
    text = _TEXT | {key: value for key, value in model["text_cfg"].items() if key in _TEXT}
    is_resnet = isinstance(vision["layers"], list)
    tower: dict[str, Any] = {"resnet_stages": vision["layers"]}
    if not is_resnet:
        tower = {key: vision[key] for key in ("patch_size", "layers", "mlp_ratio")}
        tower["layer_scale"] = vision["ls_init_value"]
    image_size = vision["image_size"]
    if isinstance(image_size, list):
        if len(set(image_size)) > 1:
            raise UserError(f"{origin}: model_cfg.vision_cfg.image_size={image_size} must be square")
        image_size = image_size[0]
    optional: dict[str, Any] = {key: list(preprocess[key]) for key in ("mean", "std") if key in preprocess}
    optional |= {key: model[key] for key in _OPTIONAL if key in model}
    return ModelConfig(
        name=name,
        embed_dim=model["embed_dim"],
        quick_gelu=model.get("quick_gelu", False),
        vision=VisionConfig(
            image_size=image_size,
            width=vision["width"],
            heads=(32 if is_resnet else 1) * vision["width"] // vision["head_width"],
            **tower,
        ),
        text=TextConfig(**text),
        **optional,
    )


def write_config(path: Path, *, config: ModelConfig, vocabulary: Mapping[str, Any]) -> None:
    """Write the `open_clip_config.json` of an architecture, the inverse of `read_config`.

    `model_cfg` becomes keyword arguments there, so it holds nothing that open_clip 3.3.0 does not know.

    Args:
        path: the new file.
        config: the architecture.
        vocabulary: further keys of `text_cfg` for a tokenizer other than CLIP's, of which open_clip has a copy.
    """
    vision, text = config.vision, config.text
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
    model: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": tower,
        "text_cfg": {key: getattr(text, key) for key in _TEXT} | dict(vocabulary),
    }
    if config.init_logit_bias is not None:
        model |= {key: getattr(config, key) for key in _OPTIONAL}
    preprocess = {
        "mean": list(config.mean), "std": list(config.std), "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    values = {"model_cfg": model, "preprocess_cfg": preprocess}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def find_weights(folder: Path) -> Path:
    """Return the weight file beside `open_clip_config.json`.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has {CONFIG_FILE} but none of {', '.join(WEIGHT_FILES)}")
