"""Decide which parameters decay, and at what share of the learning rate each trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

# Embeddings are matrices, but their rows are single vectors: decay would only shrink rare tokens and positions.
_EMBEDDING_NAMES = (
    "class_embedding", "positional_embedding", "token_embedding", "pos_embed", "cls_token", "dist_token", "reg_token",
)  # fmt: skip
# timm's transformers have tables of biases and temperatures of more than one dimension.
_NEVER_DECAYED = ("bias", "logit_scale")


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    layers_above: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups with and without weight decay, and by their layer if that matters.

    Matrices decay. Norms, biases, the temperature, class tokens, positional and token embeddings do not. A group's
    `lr_scale`, layer_decay ** (layers above), is its share of the learning rate (BEiT, Bao et al. 2022, §3.2).

    Args:
        layers_above: by name, how many layers of its tower come after a parameter; 0 for names that are not there.
    """
    above = layers_above or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = (layer_decay ** above.get(name, 0), decays(name, parameter))
            groups.setdefault(place, []).append(parameter)
    return [
        {"params": groups[place], "weight_decay": weight_decay if place[1] else 0.0, "lr_scale": place[0]}
        for place in sorted(groups, reverse=True)
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to the parameter of this dotted name."""
    is_matrix = parameter.ndim >= 2 and not any(kind in name for kind in _NEVER_DECAYED)
    return is_matrix and not any(part in _EMBEDDING_NAMES for part in name.split("."))
