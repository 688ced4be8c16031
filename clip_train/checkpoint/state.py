"""The parts of a checkpoint: model and optimizer under the model's native names, whatever wraps or shards them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

# Names that wrappers put before those of the model.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# How an optimizer computes, not what: this process decides, the checkpoint may come from another device.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


class Stateful(Protocol):
    """A part that survives a restart.

    `state_dict()` is called on every rank and read on rank 0. What it returns must not change afterwards: the
    checkpoint is written while training goes on. A part under `tensors` returns a flat dict of CPU tensors and JSON
    values, a part under `state` JSON values only.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what is needed to continue."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Continue from `state_dict`, which is the same on every rank."""


class ModelState:
    """All parameters and buffers of a plain, DDP, compiled or FSDP2-sharded model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Return whole CPU copies under native names on rank 0, possibly nothing elsewhere."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = cast("dict[str, Tensor]", get_model_state_dict(self.model, options=options))
        on_cpu = any(p.device.type == "cpu" for p in self.model.parameters())
        # On the CPU these are the model's own tensors, and training goes on changing them.
        return {name: t.clone() for name, t in tensors.items()} if on_cpu else tensors

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Copy the tensors into the model, each rank its share.

        Raises:
            UserError: names or shapes are not those of the model; the message lists the first ten.
        """
        current = cast("dict[str, Tensor]", get_model_state_dict(self.model))  # sharded tensors know their whole shape
        shapes = {name: list(t.shape) for name, t in current.items()}
        require_same({name: list(t.shape) for name, t in state_dict.items()}, shapes, owner="model")
        set_model_state_dict(self.model, dict(state_dict), options=StateDictOptions(full_state_dict=True))


class OptimizerState:
    """State tensors and hyperparameters of an optimizer over `model`'s parameters.

    torch's own helper creates missing state by stepping the optimizer, which runs its hooks and leaves `step` at 1 for
    parameters that never had a gradient. Here state that does not exist is not saved, and a resumed run stays exact.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return `state.PARAMETER.KEY` -> whole CPU copy (on rank 0), the groups by names, and the class name."""
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        names = _native_names(self.model)
        values: dict[str, Any] = {"optimizer": type(self.optimizer).__name__, "param_groups": []}
        for group in self.optimizer.param_groups:
            settings = {key: _plain(value) for key, value in group.items() if key not in ("params", *_IMPLEMENTATION)}
            values["param_groups"].append({**settings, "params": [names[p] for p in group["params"]]})
            for parameter in group["params"]:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    whole = value.full_tensor() if isinstance(value, DTensor) else value  # every rank takes part
                    if is_main:
                        values[f"state.{names[parameter]}.{key}"] = _cpu_copy(whole)
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
        more = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise UserError(f"checkpoint does not fit this {owner}: {'; '.join(differences[:10])}{more}")


def _native_names(model: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            name = name.removeprefix("module.")
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names[parameter] = name
    return names


def _cpu_copy(value: object) -> object:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _share(value: object, parameter: Tensor) -> object:
    """Return this rank's share of a whole state tensor, sharded as its parameter is."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _plain(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) else value


def _like(saved: object, current: object) -> object:
    """Give a hyperparameter that went through JSON its type back."""
    if isinstance(current, torch.Tensor):
        return torch.full_like(current, cast("float", saved))
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, list) else saved
