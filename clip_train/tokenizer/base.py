"""What every tokenizer has: special tokens around a caption's ids, cutting and padding to the context."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from clip_train.errors import CaptionTooLong, UserError

_SHOWN = 60  # characters of a caption in a message


class Tokenizer(ABC):
    """Turn captions into token ids. Instances can be pickled, to go to loader workers.

    Attributes:
        context_length: L, tokens of a padded caption.
        vocab_size: one more than the largest id.
        start_id: id before each caption, None if there is none.
        end_id: id after each caption; text never yields it, so its first place is the caption's end.
        pad_id: id that fills up to the context. It may also be a word's id: never find padding by it.
    """

    context_length: int
    vocab_size: int
    start_id: int | None
    end_id: int
    pad_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without start and end token. Never contains either."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` up to the end token, in the tokenizer's cleaned spelling."""

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, that a run must keep so that its tokenizer can be made again."""
        return {}

    def __call__(self, texts: str | list[str], *, context_length: int | None = None, truncate: bool = False) -> Tensor:
        """Tokenize one caption or several: int64 [n, L], special tokens included, padded.

        Args:
            texts: a caption or a list of captions.
            context_length: L; the tokenizer's own if None.
            truncate: cut a caption that does not fit, keeping the end token, instead of raising.

        Raises:
            CaptionTooLong: a caption does not fit and `truncate` is False.
            UserError: a caption is no text, or the context has no place for a caption.
        """
        length = self.context_length if context_length is None else context_length
        special = 1 if self.start_id is None else 2
        if length < special:
            raise UserError(f"context_length={length} must be at least {special}, for the special tokens")
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"{_shortened(text)} is no caption: give str")
        tokens = np.full((len(texts), length), self.pad_id, dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            used = self._fill(row, text)
            if used > length and not truncate:
                raise CaptionTooLong(
                    f"{_shortened(text)} has {used} tokens, context_length={length}: shorten it, or cut it with "
                    "truncate=True"
                )
        return torch.from_numpy(tokens)

    def encode_padded(self, text: str) -> tuple[np.ndarray, int, bool]:
        """Return padded tokens int64 [L], their number with the special tokens, and whether text was cut."""
        tokens = np.full(self.context_length, self.pad_id, dtype=np.int64)
        used = self._fill(tokens, text)
        return tokens, min(used, self.context_length), used > self.context_length

    def _fill(self, row: np.ndarray, text: str) -> int:
        """Write one caption into a padded row, cut to fit, and return how many tokens it has uncut."""
        ids = self.encode(text)
        first = 0 if self.start_id is None else 1
        content = ids[: len(row) - first - 1]
        if self.start_id is not None:
            row[0] = self.start_id
        row[first : first + len(content)] = content
        row[first + len(content)] = self.end_id
        return first + len(ids) + 1


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
