"""The tokenizer of another library's model folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from clip_train.errors import UserError
from clip_train.tokenizer.base import Tokenizer
from clip_train.tokenizer.cleaning import CLEANERS
from clip_train.tokenizer.huggingface import FILE_NAME, HuggingFaceTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.model.config import TextConfig

CLIP_VOCABULARY = 49408
CONFIG_FILE = "tokenizer_config.json"


class MissingTokenizer(Tokenizer):
    """Stands in for a vocabulary that a folder does not hold: token ids can be embedded, texts cannot."""

    def __init__(self, *, text: TextConfig, origin: str) -> None:
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self.start_id = None
        self.end_id = text.vocab_size - 1
        self.pad_id = text.pad_id
        self._origin = origin

    def encode(self, text: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(
            f"{self._origin}: has no {FILE_NAME}, and its vocabulary of {self.vocab_size:,} is not CLIP's: put the "
            "file there, or pass token ids"
        )

    def decode(self, ids: list[int]) -> NoReturn:
        """Raise a UserError."""
        self.encode("")


def read_tokenizer(folder: Path, *, text: TextConfig, cleaning: str, is_clips: bool) -> Tokenizer | None:
    """Return the tokenizer of a model folder, None for CLIP's own.

    Args:
        folder: that may hold `tokenizer.json`.
        text: the text tower.
        cleaning: what the library does to a caption first, one of `none`, `whitespace`, `lower`, `canonicalize`.
        is_clips: whether a vocabulary of CLIP's size is CLIP's.

    Raises:
        UserError: the file is no tokenizer, has a larger vocabulary than the model, or ends no caption.
    """
    if is_clips and text.vocab_size == CLIP_VOCABULARY:
        return None
    path = folder / FILE_NAME
    if not path.is_file():
        return MissingTokenizer(text=text, origin=str(folder))
    cleaning = {"lower": "clip"}.get(cleaning, cleaning)
    if cleaning not in CLEANERS:
        raise UserError(f"{folder}: its captions are cleaned by {cleaning!r}, which has no counterpart here")
    try:
        content = path.read_text(encoding="utf-8")
        special = _special_tokens(content, folder / CONFIG_FILE)
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
    if special["eos"] is None:
        raise UserError(f"{path}: neither it nor {CONFIG_FILE} names a token that ends a caption")
    tokenizer = HuggingFaceTokenizer(
        content, origin=str(path), context_length=text.context_length, cleaning=cleaning, **special
    )
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size:,} ids, but the model has {text.vocab_size:,}")
    return tokenizer


def _special_tokens(content: str, config: Path) -> dict[str, Any]:
    """Return the tokens that the file's own template puts around a caption, and the one that fills the context."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(content)
    plain = backend.encode("a", add_special_tokens=False).tokens
    full = backend.encode("a", add_special_tokens=True).tokens
    full = [token for token, used in zip(full, backend.encode("a").attention_mask, strict=True) if used]
    first = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:first], full[first + len(plain) :]
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    padding = backend.padding or {}
    return {
        "bos": before[0] if before else None,
        "eos": after[0] if after else _spelling(named.get("eos_token")),
        "pad": _spelling(named.get("pad_token")) or padding.get("pad_token"),
    }


def _spelling(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
