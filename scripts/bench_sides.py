"""The two models that the benchmarks compare, made from one description, and how each of them trains.

The side of open_clip imports nothing of this package: it runs in its own interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[int], Tensor]  # trains on the batch of this number, returns the loss [], on the device


def our_model(settings: dict[str, Any]) -> nn.Module:
    """Make this package's model on its device, with random weights that depend on `settings["seed"]`."""
    from omegaconf import OmegaConf

    from clip_train.model.config import ModelConfig

    fields = {key: value for key, value in settings["model"].items() if key != "open_clip"}
    fields["ragged"] = settings.get("ragged", "auto")
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), fields))
    return config.build(seed=settings["seed"]).to(settings["device"])


def open_clip_model(settings: dict[str, Any]) -> nn.Module:
    """Make the same model with open_clip on its device."""
    import open_clip

    arguments = settings["model"]["open_clip"]
    block = {} if settings["peer_block"] == "default" else {"block_type": settings["peer_block"]}
    towers = {key: arguments[key] | block for key in ("vision_cfg", "text_cfg")}
    model = open_clip.model.CLIP(**arguments | towers, output_dict=True)
    return model.to(settings["device"])


def our_step(settings: dict[str, Any]) -> Step:
    """Return this package's step, on uint8 pixels."""
    from clip_train.distributed.parallel import parallelize
    from clip_train.distributed.world import World
    from clip_train.loss.clip import ClipLoss
    from clip_train.optim.adamw import build_adamw
    from clip_train.step import TrainStep
    from clip_train.types import Batch

    world = World(device=torch.device(settings["device"]))
    inputs, model = torch.load(settings["inputs"]), our_model(settings)
    if settings["weights"]:
        model.load_state_dict(inputs["weights"])
    wrapped = parallelize(model, world=world, precision=settings["precision"], compile_blocks=settings["compile"])
    train_step = TrainStep(
        model, wrapped=wrapped, loss_fn=ClipLoss(world=world), world=world, seed=0, precision=settings["precision"],
        optimizer=build_adamw(model, **settings["adamw"]), max_grad_norm=settings["max_grad_norm"],
        micro_batch_size=settings["micro_batch"],
    )  # fmt: skip
    batches = [
        Batch(
            images=images,
            tokens=tokens,
            lengths=tokens.argmax(dim=1) + 1,
            slots=torch.arange(len(tokens)),
            valid=torch.ones(len(tokens), dtype=torch.bool),
        ).to(world.device)
        for images, tokens in zip(inputs["images"], inputs["tokens"], strict=True)
    ]

    def step(i: int) -> Tensor:
        return train_step(batches[i % len(batches)], learning_rate=settings["adamw"]["lr"], step=i).loss

    return step


def open_clip_step(settings: dict[str, Any]) -> Step:
    """Return open_clip's step as its own training loop writes it, with the flags that make it fastest.

    Its pixels are float32 and normalised, [B, 3, H, W], as its loader ships them; that is part of the step only where
    `settings["peer_normalizes"]`. AdamW is PyTorch's default form, as its main program makes it, unless
    `settings["peer_fused"]`. The parameters that decay are those of our side.
    """
    from open_clip.loss import ClipLoss

    device, adamw = settings["device"], dict(settings["adamw"])
    inputs, model = torch.load(settings["inputs"]), open_clip_model(settings)
    model.load_state_dict(inputs["weights"])
    decay = adamw.pop("weight_decay")
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if (name in inputs["decayed"]) is kind], "weight_decay": decay * kind}
        for kind in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, **adamw, fused=True if settings["peer_fused"] else None)
    loss_fn = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    mean, std = (torch.tensor(settings["model"][key])[:, None, None] for key in ("mean", "std"))
    autocast = autocast_of(settings)
    forward = torch.compile(model) if settings["compile"] else model

    def normalized(images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float().div(255).sub_(mean).div_(std).contiguous()

    prepare = (lambda images: images) if settings["peer_normalizes"] else normalized
    batches = [
        (prepare(images).to(device), tokens.to(device))
        for images, tokens in zip(inputs["images"], inputs["tokens"], strict=True)
    ]
    model.train()

    def step(i: int) -> Tensor:
        images, tokens = batches[i % len(batches)]
        if settings["peer_normalizes"]:
            images = normalized(images.cpu()).to(device)
        optimizer.zero_grad()
        with autocast:
            (loss,) = loss_fn(**forward(images, tokens), output_dict=True).values()
        loss.backward()
        if settings["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()

    return step


def autocast_of(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Return the autocast of `settings["precision"]`."""
    return torch.autocast(settings["device"], dtype=torch.bfloat16, enabled=settings["precision"] == "bf16")
