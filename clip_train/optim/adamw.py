"""AdamW, in one kernel per device, with updates that can be scaled and skipped on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from clip_train.optim.param_groups import param_groups


def build_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
    layer_decay: float = 1.0, layers_above: Mapping[str, int] | None = None,
) -> torch.optim.AdamW:  # fmt: skip
    """Make AdamW (Loshchilov & Hutter, 2019) over what `param_groups` finds to train in `model`, with its arguments.

    The fused form exists on CPU and CUDA. Besides its speed it takes a gradient scale and a skip flag as device
    tensors, so that clipping costs no pass of its own and a bad update is dropped without asking the host.
    """
    groups = param_groups(model, weight_decay=weight_decay, layer_decay=layer_decay, layers_above=layers_above)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
