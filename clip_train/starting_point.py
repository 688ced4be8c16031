"""What a run starts from: one config, on all ranks and in all attempts, that suits the tokenizer and the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clip_train.config import changes, to_yaml
from clip_train.data.loader import check_divisible
from clip_train.distributed.collectives import broadcast_object, gather_objects
from clip_train.distributed.hosts import own_host
from clip_train.distributed.world import World
from clip_train.errors import UserError, first_of
from clip_train.model.config import TextConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from clip_train.schema import TrainConfig
    from clip_train.tokenizer.base import Tokenizer


# First compute capability of NVIDIA's GPUs that computes in a short type.
_FIRST_CAPABILITY = {"bf16": (8, 0), "fp16": (5, 3)}

# What may be another path or number on another machine.
_MAY_DIFFER_BY_RANK = ("device", "data.train", "data.val", "data.cache", "data.workers", "launch")


def check_ranks(config: TrainConfig, *, world: World) -> None:
    """Check that all ranks have the same config, run directory included, and can compute as it says. All call it.

    Raises:
        UserError: a rank was started with another config, and is named with its machine and what differs; or the batch
            cannot be cut into equal parts; or this rank's device does not compute in the precision.
    """
    own = to_yaml(config)
    first = broadcast_object(own, world=world, group=world.host_group)
    differences = changes(first, own, may_differ=_MAY_DIFFER_BY_RANK) if own != first else []
    told = gather_objects((own_host(), differences), world=world, group=world.host_group)
    for rank, (host, different) in enumerate(told):
        if different:
            raise UserError(
                f"rank {rank} on {host} was started with another config than rank 0: {'; '.join(different)}"
            )
    check_batch(config, ranks=world.size)
    require_precision(config.precision.value, device=world.device)


def check_batch(config: TrainConfig, *, ranks: int) -> None:
    """Check that ranks and micro-batches are of equal size.

    Raises:
        UserError: naming the nearest sizes that work.
    """
    check_divisible(config.global_batch_size, world=World(size=ranks))
    rows, micro = config.global_batch_size // ranks, config.micro_batch_size
    if isinstance(micro, int) and rows % micro:
        nearest = min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - micro))
        raise UserError(f"micro_batch_size={micro} must divide the {rows} pairs of each rank: nearest {nearest}")


def require_precision(precision: str, *, device: torch.device) -> None:
    """Check that a device computes in the type of `precision`.

    Raises:
        UserError: it does not, or only by emulation, which is slower than fp32.
    """
    import torch

    first = _FIRST_CAPABILITY.get(precision)
    if device.type != "cuda" or torch.version.hip or first is None:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < first:
        choices = "fp16 or fp32" if capability >= _FIRST_CAPABILITY["fp16"] else "fp32"
        raise UserError(
            f"precision={precision}: {torch.cuda.get_device_name(device)} does not compute in it; choose {choices}"
        )


def suited_to(tokenizer: Tokenizer, *, config: TrainConfig) -> TrainConfig:
    """Return the config with the vocabulary, end token, padding and context of the tokenizer in the text tower.

    Raises:
        UserError: the text tower was given another vocabulary or end token.
    """
    text = config.model.text
    # The end token is found as the largest id where it is that, which every library can do.
    end_id = None if tokenizer.end_id == tokenizer.vocab_size - 1 else tokenizer.end_id
    if text.vocab_size not in (TextConfig().vocab_size, tokenizer.vocab_size):
        raise UserError(
            f"model.text.vocab_size={text.vocab_size} differs from the {tokenizer.vocab_size} ids of "
            f"tokenizer={config.tokenizer.name}; choose the model's own tokenizer"
        )
    if text.end_id not in (None, end_id):
        raise UserError(f"model.text.end_id={text.end_id} is not the tokenizer's, which is {tokenizer.end_id}")
    text = replace(
        text, vocab_size=tokenizer.vocab_size, end_id=end_id, pad_id=tokenizer.pad_id,
        context_length=tokenizer.context_length,
    )  # fmt: skip
    return replace(config, model=replace(config.model, text=text))


def require_same_run(config: TrainConfig, *, folder: Path, world: World) -> None:
    """Refuse a config that would turn the run or checkpoint in `folder` into another one. Rank 0 reads for all.

    Raises:
        UserError: naming every key that differs and may not.
    """
    path = folder / "config.yaml"
    former = path.read_text(encoding="utf-8") if world.is_main and path.exists() and config.resume != "never" else ""
    differences = changes(former, to_yaml(config)) if (former := broadcast_object(former, world=world)) else []
    if differences:
        shown = first_of(differences, between="\n  ")
        raise UserError(
            f"{folder} is of a run with another config; give a new name=, or resume=never, or model.init= to start "
            f"from its weights alone:\n  {shown}"
        )
