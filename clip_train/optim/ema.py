"""An exponential moving average of the weights, kept where the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clip_train.distributed.shards import fill

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clip_train.distributed.shards import Sliceable


class Ema:
    """Average of every parameter of a model, and a copy of its buffers: average += (1 - decay)·(weight - average).

    Plain and sharded parameters alike: an average is laid out as its parameter. Stateful, with the model's own keys.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start from the weights that `model` has now. Give the model itself, not its DDP wrapper."""
        self._model, self._decay = model, decay
        self._averages = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights and copy the buffers, on the device."""
        weights = self._model.state_dict()
        trained = [name for name, _ in self._model.named_parameters()]
        torch._foreach_lerp_(
            [self._averages[name] for name in trained], [weights[name] for name in trained], 1.0 - self._decay
        )
        for name in self._averages.keys() - set(trained):
            self._averages[name].copy_(weights[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages for the time of the context, to evaluate them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages themselves, laid out as the parameters are."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Sliceable]) -> None:
        """Copy averages with all their rows, each rank its share.

        Raises:
            KeyError: a tensor is missing or unknown.
        """
        if state.keys() != self._averages.keys():
            raise KeyError(f"averages and model differ in {sorted(state.keys() ^ self._averages.keys())}")
        for name, average in self._averages.items():
            fill(average, state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._model.state_dict().items():
            weight = value.detach().clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(weight)
