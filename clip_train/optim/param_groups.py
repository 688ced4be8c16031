"""Decide which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

# Embeddings are matrices, but their rows are single vectors: decay would only shrink rare tokens and positions.
_EMBEDDING_NAMES = ("class_embedding", "positional_embedding", "token_embedding", "pos_embed", "cls_token", "reg_token")


def param_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group with weight decay and one without.

    Matrices decay. Norms, biases, the temperature, class tokens, positional and token embeddings do not. Empty groups
    are left out.
    """
    decay: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else constant).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to the parameter of this dotted name."""
    return parameter.ndim >= 2 and not any(part in _EMBEDDING_NAMES for part in name.split("."))
