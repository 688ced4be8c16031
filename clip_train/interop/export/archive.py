"""The archive that OpenAI's `clip.load` reads."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from clip_train.model.config import ModelConfig

ARCHIVE_FILE = "openai_clip.pt"


def write_archive(path: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a TorchScript archive of empty modules that carry the parameters under their dotted names.

    `clip.load` reads the archive's state dict and builds its own model; a plain `torch.save` file makes it fail (it
    reads on from the end of the file, openai/CLIP#396). A `logit_bias` is left out: there is none in that library.

    Args:
        path: the new file.
        config: the architecture, for the three integers that the loader expects.
        tensors: weights under native names, written in float32.
    """
    root = nn.Module()
    integers = {
        "input_resolution": config.vision.image_size,
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
    }
    for name, tensor in tensors.items():
        if name == "logit_bias":
            continue
        *parents, leaf = name.split(".")
        owner = root
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        if "running_" in leaf or not tensor.is_floating_point():
            owner.register_buffer(leaf, tensor.clone())
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor.float(), requires_grad=False))
    for name, value in integers.items():
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        # TorchScript is deprecated, and the only thing that this loader reads.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root).save(str(path))


def round_like_clip_load(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as OpenAI's `convert_weights` rounds them, which `clip.load` computes with, also on CPUs.

    Convolutions, linear layers, attention and the two projections go through half precision; norms, embeddings and
    positions keep float32.
    """
    return {name: tensor.half().float() if is_rounded(name) else tensor for name, tensor in tensors.items()}


def is_rounded(name: str) -> bool:
    """Say whether `clip.load` keeps the tensor of this native name in half precision."""
    if name in ("text_projection", "visual.proj"):
        return True
    *_, module, leaf = ("", *name.split("."))
    if module.startswith(("conv", "out_proj", "c_fc", "c_proj", "q_proj", "k_proj", "v_proj")):
        return True
    return leaf.startswith("in_proj_") or ".downsample.0." in name
