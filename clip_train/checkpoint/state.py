"""The parts of a checkpoint: model and optimizer under the model's native names, whatever wraps or shards them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from clip_train.checkpoint.tensors import SavedTensor
from clip_train.distributed.shards import fill, laid_out
from clip_train.errors import UserError, first_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from clip_train.distributed.shards import Sliceable

# Names that wrappers put before those of the model.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# How an optimizer computes, not what: this process decides, the checkpoint may come from another device.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


class Stateful(Protocol):
    """A part that survives a restart.

    `state_dict()` is called on every rank; what it returns is copied before anything else happens. A part under
    `tensors` returns a flat dict of tensors, sharded or not, and JSON values, a part under `state` JSON values only.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what is needed to continue."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Continue from `state_dict`, which is the same on every rank. Its tensors may still be on disk."""


class ModelState:
    """All parameters and buffers of a plain, DDP, compiled or FSDP2-sharded model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's own tensors under native names."""
        return {_native_name(self.model, name): tensor for name, tensor in self.model.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Sliceable], /) -> None:
        """Copy the tensors into the model, each rank its share.

        Raises:
            UserError: names or shapes are not those of the model; the message lists the first ten.
        """
        current = self.state_dict()  # sharded tensors know their whole shape
        shapes = {name: list(t.shape) for name, t in current.items()}
        require_same({name: list(t.shape) for name, t in state_dict.items()}, shapes, owner="model")
        for name, tensor in current.items():
            fill(tensor, state_dict[name])


class OptimizerState:
    """State tensors and hyperparameters of an optimizer over `model`'s parameters.

    torch's own helper creates missing state by stepping the optimizer, which runs its hooks and leaves `step` at 1 for
    parameters that never had a gradient. Here state that does not exist is not saved, and a resumed run stays exact.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return `state.PARAMETER.KEY` -> the optimizer's own tensor, the groups by names, and the class name."""
        names = _native_names(self.model)
        values: dict[str, Any] = {"optimizer": type(self.optimizer).__name__, "param_groups": []}
        for group in self.optimizer.param_groups:
            settings = {key: _plain(value) for key, value in group.items() if key not in ("params", *_IMPLEMENTATION)}
            values["param_groups"].append({**settings, "params": [names[p] for p in group["params"]]})
            for parameter in group["params"]:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    values[f"state.{names[parameter]}.{key}"] = value
        return values

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Replace the optimizer's state, each rank its share of sharded tensors.

        Raises:
            UserError: another optimizer, or other groups of parameters; the message lists the first ten.
        """
        if state_dict["optimizer"] != type(self.optimizer).__name__:
            raise UserError(f"optimizer {state_dict['optimizer']} saved, {type(self.optimizer).__name__} configured")
        names = _native_names(self.model)
        groups = self.optimizer.param_groups
        require_same(
            {name: f"group {i}" for i, group in enumerate(state_dict["param_groups"]) for name in group["params"]},
            {names[p]: f"group {i}" for i, group in enumerate(groups) for p in group["params"]},
            owner="optimizer",
        )
        by_parameter: dict[str, dict[str, Any]] = {}
        for name, value in state_dict.items():
            if name.startswith("state."):
                parameter, _, key = name.removeprefix("state.").rpartition(".")
                by_parameter.setdefault(parameter, {})[key] = value
        self.optimizer.load_state_dict(self._as_torch(groups, state_dict["param_groups"], by_parameter, names))

    def _as_torch(
        self,
        groups: list[dict[str, Any]],
        saved_groups: list[dict[str, Any]],
        by_parameter: dict[str, dict[str, Any]],
        names: dict[Tensor, str],
    ) -> dict[str, Any]:
        """Return the saved state as `torch.optim.Optimizer.load_state_dict` wants it: by position."""
        state: dict[int, dict[str, Any]] = {}
        new_groups = []
        position = 0
        for group, saved in zip(groups, saved_groups, strict=True):
            settings = {key: _like(value, group.get(key)) for key, value in saved.items()}
            new_groups.append({**group, **settings, "params": [position + i for i in range(len(group["params"]))]})
            for parameter in group["params"]:
                values = by_parameter.get(names[parameter])
                if values is not None:
                    state[position] = {key: _share(value, parameter) for key, value in values.items()}
                position += 1
        return {"state": state, "param_groups": new_groups}


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], *, owner: str) -> None:
    """Compare what a checkpoint holds with what is there, name by name.

    Raises:
        UserError: they differ; the message lists the first ten names.
    """
    differences = []
    for name in sorted(saved.keys() | current.keys()):
        if name not in current:
            differences.append(f"{name} {saved[name]} only in the checkpoint")
        elif name not in saved:
            differences.append(f"{name} {current[name]} only in the {owner}")
        elif saved[name] != current[name]:
            differences.append(f"{name} {saved[name]} in the checkpoint, {current[name]} in the {owner}")
    if differences:
        raise UserError(f"checkpoint does not fit this {owner}: {first_of(differences, between='; ')}")


def _native_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: _native_name(model, name) for name, parameter in model.named_parameters()}


def _native_name(model: nn.Module, name: str) -> str:
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        name = name.removeprefix("module.")
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _share(value: object, parameter: Tensor) -> object:
    """Return this rank's share of a state tensor, sharded as its parameter is; counters are whole everywhere.

    A counter looks like the state of a parameter without dimensions, but torch decides by its optimizer where it lives.
    """
    if not isinstance(value, torch.Tensor | SavedTensor):
        return value
    return laid_out(value, like=parameter) if parameter.ndim and value.shape == parameter.shape else value[...]


def _plain(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) else value


def _like(saved: object, current: object) -> object:
    """Give a hyperparameter that went through JSON its type back."""
    if isinstance(current, torch.Tensor):
        return torch.full_like(current, cast("float", saved))
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, list) else saved
