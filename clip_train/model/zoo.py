"""Architectures by name: the rows in `configs/model/`, read without Hydra."""

from __future__ import annotations

import difflib
from functools import cache
from typing import TYPE_CHECKING, cast

from clip_train.config_dir import config_dir
from clip_train.errors import UserError
from clip_train.model.config import ModelConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from clip_train.model.clip import CLIP

# OpenAI's spelling, in OpenAI's order, to the row. A slash means QuickGELU, which OpenAI's weights need; a ResNet's
# name has none, and is the row of the same name here as in a config.
OPENAI_NAMES = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


@cache
def available_models() -> tuple[str, ...]:
    """Return the names that `create_model` knows: OpenAI's spellings, then the rows."""
    rows = {path.stem for path in (config_dir() / "model").glob("*.yaml")}
    return (*OPENAI_NAMES, *sorted(rows - OPENAI_NAMES.keys(), key=str.lower))


def model_config(name: str, **overrides: object) -> ModelConfig:
    """Read the row `name`, with fields replaced (`quick_gelu=True`, `text={"context_length": 32}`).

    Raises:
        UserError: no such row (the nearest names are given), no such field, or a value out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if name not in available_models():
        near = difflib.get_close_matches(name, available_models(), n=3, cutoff=0.0)
        raise UserError(f"no model is named {name!r}; the nearest names are {', '.join(near)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), _read_row(OPENAI_NAMES.get(name, name)), overrides)
    except OmegaConfBaseException as error:
        raise UserError(f"create_model({name!r}): {str(error).splitlines()[0]}") from error
    return cast("ModelConfig", OmegaConf.to_object(merged))


def create_model(name: str, *, seed: int = 0, **overrides: object) -> CLIP:
    """Make the architecture `name` with random weights; `overrides` replace fields of its row, see `model_config`.

    A timm tower has timm's own weights if `vision.pretrained` is set.

    Raises:
        UserError: as `model_config`; or timm's weights cannot be had.
    """
    config = model_config(name, **overrides)
    model = config.build(seed=seed)
    if config.vision.pretrained:
        model.load_timm_weights()
    return model


def _read_row(name: str) -> DictConfig:
    """Read one file and the rows its `defaults` name; `base` stands for the dataclass, `_self_` for the file itself."""
    from omegaconf import OmegaConf

    values = cast("DictConfig", OmegaConf.load(config_dir() / "model" / f"{name}.yaml"))
    parts = []
    for default in values.pop("defaults"):
        if default == "_self_":
            parts.append(values)
        elif default != "base":
            parts.append(_read_row(default))
    return cast("DictConfig", OmegaConf.merge(*parts))
