"""Choices of `tokenizer=`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_train.tokenizer.bpe import ClipTokenizer


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """CLIP's lower-cased byte-pair encoding, 49,408 ids. The context length is the model's."""

    name: str = "clip"

    def build(self, *, context_length: int) -> ClipTokenizer:
        """Make the tokenizer that pads and truncates to `context_length` tokens."""
        from clip_train.tokenizer.bpe import ClipTokenizer

        return ClipTokenizer(context_length)
