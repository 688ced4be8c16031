"""Weight files of every layout, read into the native names (those of OpenAI CLIP)."""

from __future__ import annotations

import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.model.clip import CLIP

# What torch.compile, DDP and open_clip's second layout put before a name.
PREFIXES = ("module.", "_orig_mod.", "text.")
# OpenAI's archives carry these beside the parameters; no other library does.
OPENAI_INTEGERS = ("input_resolution", "context_length", "vocab_size")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors`, a TorchScript archive or a file of `torch.save` into native names, on the CPU.

    The archive is opened for its parameters and never called; `torch.save` files are read with `weights_only=True`.

    Raises:
        UserError: the file is unreadable, or holds no tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            values: Any = load_file(path)
        elif _is_torchscript(path):
            values = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable weight file ({str(error).splitlines()[0]})") from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict) or not any(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{path}: holds no tensors by name, neither at the top nor under 'state_dict'")
    return {_native_name(name): value for name, value in values.items() if isinstance(value, Tensor)}


def take_openai_integers(tensors: dict[str, Tensor]) -> bool:
    """Remove the three integers of OpenAI's archives; return whether they were there."""
    found = [tensors.pop(name) for name in OPENAI_INTEGERS if name in tensors]
    return len(found) == len(OPENAI_INTEGERS)


def openai_config(tensors: dict[str, Tensor], *, name: str) -> ModelConfig:
    """Return the architecture of OpenAI's weights from the shapes of the tensors (`build_model` in OpenAI CLIP).

    Heads are 64 wide, and the activation is QuickGELU: shapes cannot tell either, OpenAI's models all agree.

    Raises:
        UserError: the tensors are not those of a CLIP model.
    """
    try:
        context_length, width = tensors["positional_embedding"].shape
        return ModelConfig(
            name=name,
            embed_dim=tensors["text_projection"].shape[1],
            quick_gelu=True,
            vision=_openai_resnet(tensors) if "visual.layer1.0.conv1.weight" in tensors else _openai_vit(tensors),
            text=TextConfig(
                context_length=context_length,
                vocab_size=tensors["token_embedding.weight"].shape[0],
                width=width,
                layers=_num_blocks(tensors, "transformer"),
                heads=width // 64,
            ),
        )
    except KeyError as error:
        raise UserError(f"{name}: no tensor {error}, so not a CLIP model") from error


def _openai_vit(tensors: dict[str, Tensor]) -> VisionConfig:
    kernel = tensors["visual.conv1.weight"]  # [width, 3, P, P]
    width, patch_size = kernel.shape[0], kernel.shape[-1]
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    return VisionConfig(
        image_size=patch_size * grid,
        patch_size=patch_size,
        width=width,
        layers=_num_blocks(tensors, "visual.transformer"),
        heads=width // 64,
    )


def _openai_resnet(tensors: dict[str, Tensor]) -> VisionConfig:
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    grid = round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    stages = [
        sum(name.startswith(f"visual.layer{stage}.") and name.endswith(".conv1.weight") for name in tensors)
        for stage in (1, 2, 3, 4)
    ]
    return VisionConfig(image_size=32 * grid, width=width, heads=32 * width // 64, resnet_stages=stages)


def assign_weights(model: CLIP, tensors: dict[str, Tensor], *, origin: str) -> None:
    """Give the model, possibly on the meta device, these tensors as float32 parameters.

    Raises:
        UserError: names or shapes differ; up to five of each kind are listed.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(())  # some files hold [1]
    reshaped = {name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name]}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [f"{n} {list(tensors[n].shape)}, not {list(expected[n])}" for n in sorted(reshaped)],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise UserError(f"{origin}: the tensors are not those of {model.config.name}: {'; '.join(found)}")
    model.load_state_dict(tensors, assign=True)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _native_name(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def _num_blocks(tensors: dict[str, Tensor], stack: str) -> int:
    return sum(name.startswith(f"{stack}.resblocks.") and name.endswith(".attn.in_proj_weight") for name in tensors)
