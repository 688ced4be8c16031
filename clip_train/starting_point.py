"""What a run starts from: a text tower that suits the tokenizer, and numbers that suit the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.model.config import TextConfig

if TYPE_CHECKING:
    import torch

    from clip_train.schema import TrainConfig
    from clip_train.tokenizer.base import Tokenizer


# First compute capability of NVIDIA's GPUs that computes in a short type.
_FIRST_CAPABILITY = {"bf16": (8, 0), "fp16": (5, 3)}


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
