"""OpenAI's weights: the architecture is read off the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from torch import Tensor

# OpenAI's archives carry these beside the parameters; no other library does.
INTEGERS = ("input_resolution", "context_length", "vocab_size")


def take_integers(tensors: dict[str, Tensor]) -> bool:
    """Remove the three integers of OpenAI's archives; return whether they were there."""
    found = [tensors.pop(name) for name in INTEGERS if name in tensors]
    return len(found) == len(INTEGERS)


def infer_config(tensors: dict[str, Tensor], *, name: str, origin: str) -> ModelConfig:
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
            vision=_resnet(tensors) if "visual.layer1.0.conv1.weight" in tensors else _transformer(tensors),
            text=TextConfig(
                context_length=context_length,
                vocab_size=tensors["token_embedding.weight"].shape[0],
                width=width,
                layers=_num_blocks(tensors, "transformer"),
                heads=width // 64,
            ),
        )
    except (KeyError, ValueError, IndexError, UserError) as error:
        keys = ", ".join(sorted(tensors)[:10])
        raise UserError(f"{origin}: not OpenAI's CLIP ({error}); its first keys: {keys}") from error


def _transformer(tensors: dict[str, Tensor]) -> VisionConfig:
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


def _resnet(tensors: dict[str, Tensor]) -> VisionConfig:
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    grid = round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    stages = [
        sum(name.startswith(f"visual.layer{stage}.") and name.endswith(".conv1.weight") for name in tensors)
        for stage in (1, 2, 3, 4)
    ]
    return VisionConfig(image_size=32 * grid, width=width, heads=32 * width // 64, resnet_stages=stages)


def _num_blocks(tensors: dict[str, Tensor], stack: str) -> int:
    return sum(name.startswith(f"{stack}.resblocks.") and name.endswith(".attn.in_proj_weight") for name in tensors)
