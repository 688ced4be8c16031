"""Train part of a model: the order of its layers, and locked ones (LiT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from clip_train.distributed.parallel import SCALARS
from clip_train.errors import UserError
from clip_train.model.adapters import add_adapters

if TYPE_CHECKING:
    from clip_train.model.clip import CLIP

VISION, TEXT = "vision", "text"
# Lists of blocks, in the order of their use, and what comes after them; everything else in a tower comes before.
_BLOCK_LISTS = {
    VISION: (
        ("visual.transformer.resblocks",),
        ("visual.layer1", "visual.layer2", "visual.layer3", "visual.layer4"),
        ("visual.trunk.blocks",),
        ("visual.trunk.stages",),
        ("visual.trunk.layer1", "visual.trunk.layer2", "visual.trunk.layer3", "visual.trunk.layer4"),
    ),
    TEXT: (("transformer.resblocks",),),
}
_HEADS = (
    "visual.ln_post", "visual.proj", "visual.attnpool", "visual.head", "visual.trunk.norm.", "visual.trunk.fc_norm",
    "visual.trunk.attn_pool", "visual.trunk.head", "ln_final", "text_projection",
)  # fmt: skip


class Place(NamedTuple):
    """Where a parameter stands in its tower."""

    tower: str
    depth: int  # 0 before the blocks, i + 1 in block i, num_blocks + 1 after them
    num_blocks: int


def places(model: nn.Module) -> dict[str, Place]:
    """Return the place of every parameter by name; temperature and bias have none.

    Blocks are those of transformers and the residual ones of ResNets. A tower without any has `num_blocks` 0.
    """
    blocks = {tower: _blocks(model, tower) for tower in (VISION, TEXT)}
    found = {}
    for name, _ in model.named_parameters():
        if name in SCALARS:
            continue
        tower = VISION if name.startswith("visual.") else TEXT
        depth = 0
        for i, block in enumerate(blocks[tower]):
            if name.startswith(block):
                depth = i + 1
        if name.startswith(_HEADS):
            depth = len(blocks[tower]) + 1
        found[name] = Place(tower, depth, len(blocks[tower]))
    return found


def layers_above(model: nn.Module) -> dict[str, int]:
    """Return by name how many layers of its tower come after each parameter: 0 after the blocks, 1 in the last block.

    Raises:
        UserError: the image tower has no blocks that this library knows.
    """
    found = places(model)
    if any(place.num_blocks == 0 for place in found.values()):
        raise UserError("optim.layer_decay needs towers of blocks; this model.vision.timm has none that are known")
    return {name: place.num_blocks + 1 - place.depth for name, place in found.items()}


def prepare(model: CLIP, *, seed: int) -> None:
    """Lock what `model.vision.unlocked_blocks` and `model.text.unlocked_blocks` say, then add adapters if asked.

    Call it before the model is wrapped and given to an optimizer. Locked modules stay in evaluation mode: their batch
    statistics do not move and they drop nothing.

    Raises:
        UserError: a tower has fewer blocks than are to be unlocked, or none that adapters fit, or peft is missing.
    """
    config = model.config
    unlocked = {VISION: config.vision.unlocked_blocks, TEXT: config.text.unlocked_blocks}
    parameters = dict(model.named_parameters())
    for name, place in places(model).items():
        count = unlocked[place.tower]
        if count is None:
            continue
        if count > place.num_blocks:
            raise UserError(
                f"model.{place.tower}.unlocked_blocks={count}: the tower has {place.num_blocks} blocks that are known"
            )
        parameters[name].requires_grad_(count > 0 and place.depth > place.num_blocks - count)
    if config.lora.rank:
        _adapt(model, seed=seed)
    model.locked = [
        module for module in model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]  # fmt: skip


def _adapt(model: CLIP, *, seed: int) -> None:
    """Add adapters in every tower that is not wholly locked."""
    lora, places_of = model.config.lora, places(model)
    unlocked = {place.tower for name, place in places_of.items() if model.get_parameter(name).requires_grad}
    adapted = {places_of[name].tower for name in add_adapters(model, config=lora, seed=seed)}
    for tower in sorted(unlocked - adapted):
        raise UserError(
            f"model.lora.rank={lora.rank}: the {tower} tower has no transformer block to adapt; lock it with "
            f"model.{tower}.unlocked_blocks=0"
        )


def _blocks(model: nn.Module, tower: str) -> list[str]:
    """Return the prefixes of a tower's blocks, first to last."""
    modules = dict(model.named_modules())
    for lists in _BLOCK_LISTS[tower]:
        if all(name in modules for name in lists):
            return [f"{name}.{i}." for name in lists for i, _ in enumerate(modules[name].children())]
    return []
