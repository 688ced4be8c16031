"""A small run to save and resume: a model with a 0-d parameter and an odd number of rows, and its optimizer."""

from pathlib import Path

import torch
from torch import nn

from clip_train.checkpoint.checkpointer import Checkpointer
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.state import ModelState, OptimizerState
from clip_train.distributed.world import World


class Model(nn.Module):
    def __init__(self, *, width: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.tensor([1, 2, 3]))

    def forward(self, rows):
        return self.second(torch.tanh(self.first(rows))) * self.logit_scale.exp()


class Counter:
    """A part without tensors."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    """Two groups, as weight decay needs them."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    """Take steps whose input depends on their number alone."""
    for step in steps:
        rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).device)
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()


class Fixed:
    """A part whose tensors all hold one value: which save it came from can be read off."""

    def __init__(self, value: float = -1.0, *, size: int = 1000) -> None:
        self.tensors = {"a": torch.empty(size), "b": torch.empty(7, dtype=torch.float64), "c": torch.empty(())}
        self.fill(value)

    def fill(self, value: float) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(value)

    @property
    def value(self) -> float:
        values = {float(v) for tensor in self.tensors.values() for v in tensor.reshape(-1)}
        assert len(values) == 1, f"a mixture of saves: {values}"
        return values.pop()

    def state_dict(self):
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state_dict):
        for name, tensor in self.tensors.items():
            tensor.copy_(state_dict[name][...])


def open_fixed(run_dir: Path, *, lines: list[str] | None = None, size: int = 1000, world=None, **config):
    """Return a checkpointer of one `Fixed` part, and that part."""
    part = Fixed(size=size)
    checkpointer = Checkpointer(
        run_dir,
        world=world or World(),
        config=CheckpointConfig(**{"asynchronous": False, **config}),
        tensors={"model": part},
        state={"counter": Counter(7)},
        say=lines.append if lines is not None else lambda line: None,
    )
    return checkpointer, part


def save_steps(run_dir: Path, *steps: int, size: int = 1000, **config) -> None:
    """Write checkpoints whose tensors hold their step."""
    checkpointer, part = open_fixed(run_dir, size=size, **config)
    with checkpointer:
        for step in steps:
            part.fill(step)
            checkpointer.save(step=step, consumed=8 * step, config_yaml="steps: 9\n")


def open_training(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, world=None, say=lambda line: None, **config
):
    """Return a checkpointer of a model and its optimizer."""
    return Checkpointer(
        run_dir,
        world=world or World(),
        config=CheckpointConfig(**config),
        tensors={"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)},
        state={"counter": Counter(3)},
        say=say,
    )
