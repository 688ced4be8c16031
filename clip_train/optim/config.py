"""Choices of `optim=`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clip_train.optim.ema import Ema


class Schedule(StrEnum):
    cosine = "cosine"
    constant = "constant"


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Fields that every optimizer has."""

    name: str = "???"
    lr: float = 5e-4
    """Highest learning rate, reached at the end of the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly; 0 for none. Must be below `steps`."""
    schedule: Schedule = Schedule.cosine
    """After the warm-up: `cosine` falls along half a cosine towards 0 at the end of the run, `constant` stays."""
    max_grad_norm: float | None = None
    """Gradients whose norm over all parameters is larger are scaled down to it; null for no clipping."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer between a parameter and its tower's output: the last block has it
    once, the embeddings one time more than there are blocks. 1 for none."""
    ema_decay: float | None = None
    """Share of the average that an update keeps, such as 0.9999; null for no averaged weights."""

    def __post_init__(self) -> None:
        _check("lr", self.lr, self.lr > 0, "be positive")
        _check("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "lie in (0, 1]")
        _check("warmup", self.warmup, self.warmup >= 0, "be 0 or more")
        _check("max_grad_norm", self.max_grad_norm, self.max_grad_norm is None or self.max_grad_norm > 0, "be positive")
        decay = self.ema_decay
        _check("ema_decay", decay, decay is None or 0 < decay < 1, "lie between 0 and 1")

    def build(self, model: nn.Module, *, layers_above: Mapping[str, int] | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of `model`'s parameters.

        layers_above: by name, how many layers come after a parameter, for `layer_decay`.
        """
        raise NotImplementedError

    def learning_rate(self, step: int, *, total_steps: int) -> float:
        """Return the learning rate of the update that `step` makes, counted from 0."""
        from clip_train.optim.schedule import learning_rate

        return learning_rate(
            step, peak=self.lr, warmup=self.warmup, total_steps=total_steps, schedule=self.schedule.value
        )

    def build_ema(self, model: nn.Module) -> Ema | None:
        """Make the averaged weights of `model`, if there are to be any."""
        if self.ema_decay is None:
            return None
        from clip_train.optim.ema import Ema

        return Ema(model, decay=self.ema_decay)


@dataclass(slots=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter, 2019) with CLIP's numbers (Radford et al. 2021, table 19)."""

    name: str = "adamw"
    weight_decay: float = 0.2
    """Applies to matrices; not to norms, biases, the temperature, class tokens and embedding tables."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of the mean and of the mean square of the gradient."""
    eps: float = 1e-6
    """Added to the root of the mean square."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "be 0 or more")
        _check("betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "be two in [0, 1)")
        _check("eps", self.eps, self.eps > 0, "be positive")

    def build(self, model: nn.Module, *, layers_above: Mapping[str, int] | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of `model`; sharded models first, then their optimizer."""
        from clip_train.optim.adamw import build_adamw

        beta1, beta2 = self.betas
        return build_adamw(
            model, lr=self.lr, weight_decay=self.weight_decay, betas=(beta1, beta2), eps=self.eps,
            layer_decay=self.layer_decay, layers_above=layers_above,
        )  # fmt: skip


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"optim.{name}={value} must {rule}")
