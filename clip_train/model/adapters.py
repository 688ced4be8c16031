"""Low-rank adapters (LoRA) on the matrices of transformer blocks, made by peft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from clip_train.distributed.parallel import transformer_blocks
from clip_train.errors import UserError
from clip_train.model.transformer import Attention

if TYPE_CHECKING:
    from clip_train.model.clip import CLIP
    from clip_train.model.config import LoraConfig

# How peft names a layer that it adapts, and the two factors beside it.
_BASE, _DOWN, _UP = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"
# The input projection of our attention is a layer only while it is adapted.
_PROJECTION = re.compile(r"(resblocks\.\d+\.attn\.in_proj)\.(weight|bias)")


class Adapters(NamedTuple):
    """The trained parts of a run with LoRA, apart from its temperature and bias."""

    rank: int
    alpha: float
    factors: dict[str, tuple[Tensor, Tensor]]  # by native name of the matrix: down [rank, inputs], up [outputs, rank]

    def merged_into(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with each adapter added to its matrix."""
        scale = self.alpha / self.rank
        return dict(tensors) | {name: tensors[name] + scale * (up @ down) for name, (down, up) in self.factors.items()}


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        UserError: it is not, with what to install.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("model.lora.rank needs peft: pip install 'clip-train[lora]'") from error


def add_adapters(model: CLIP, *, config: LoraConfig, seed: int) -> set[str]:
    """Freeze the model and adapt, W + alpha/rank · up·down, each matrix that was trained in a transformer block.

    Temperature and bias train on. The factors `down` are drawn from `seed`, `up` are zero: the model is the same.

    Returns:
        the names of the matrices.

    Raises:
        UserError: peft is not installed.
    """
    require_peft()
    import peft

    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0 and parameter.requires_grad]
    blocks = set(transformer_blocks(model))
    names = []
    for prefix, block in [(name, module) for name, module in model.named_modules() if module in blocks]:
        for attention in [module for module in block.modules() if isinstance(module, Attention)]:
            if id(attention.in_proj_weight) in trained:
                attention.split_projection()
        names += [
            f"{prefix}.{name}" for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and id(layer.weight) in trained
        ]  # fmt: skip
    model.requires_grad_(False)
    if names:
        layers = "|".join(re.escape(name) for name in names)
        alpha = cast("int", _alpha(config))  # so peft's hint; it divides by the rank
        chosen = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(chosen, model)
    for parameter in scalars:
        parameter.requires_grad_(True)
    return {_native(f"{name}.weight") for name in names}


def split_adapters(tensors: Mapping[str, Tensor], *, config: LoraConfig) -> tuple[dict[str, Tensor], Adapters | None]:
    """Return the weights that a run with adapters leaves alone, under native names, and the adapters, None without any.

    config: the run's `model.lora`.
    """
    if not config.rank:
        return dict(tensors), None
    left = {_native(name): t for name, t in tensors.items() if not name.endswith((_DOWN, _UP))}
    factors = {
        _native(f"{stem}.weight"): (tensors[name], tensors[stem + _UP])
        for name in tensors
        if (stem := name.removesuffix(_DOWN)) != name
    }
    return left, Adapters(config.rank, _alpha(config), factors)


def _alpha(config: LoraConfig) -> float:
    return config.rank if config.alpha is None else config.alpha


def _native(name: str) -> str:
    return _PROJECTION.sub(r"\1_\2", name.replace(_BASE, ""))
