"""What a run starts from: a text tower that suits the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.model.config import TextConfig

if TYPE_CHECKING:
    from clip_train.schema import TrainConfig
    from clip_train.tokenizer.base import Tokenizer


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
