"""Choices of `tokenizer=`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.tokenizer.base import Tokenizer

# transformers takes an end id of 2 for a mistake of old files, and reads such models at the largest id instead.
REFUSED_END_ID = 2


class Cleaning(StrEnum):
    none = "none"
    whitespace = "whitespace"
    clip = "clip"
    canonicalize = "canonicalize"


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """Fields that every tokenizer has. Its vocabulary and end token become those of the text tower."""

    name: str = "???"
    context_length: int | None = None
    """Tokens of the longest caption, special tokens included; null: `model.text.context_length`."""

    def __post_init__(self) -> None:
        if self.context_length is not None and self.context_length < 3:
            raise UserError(
                f"tokenizer.context_length={self.context_length} must be at least 3: start token, one token, end token"
            )

    def build(self, *, context_length: int, kept_in: Path | None = None) -> Tokenizer:
        """Make the tokenizer.

        Args:
            context_length: the model's, for a tokenizer without its own.
            kept_in: folder of a run or a checkpoint that may hold the tokenizer's files.

        Raises:
            UserError: a file is not there, or is no tokenizer that this library can use.
        """
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class ClipTokenizerConfig(TokenizerConfig):
    """CLIP's lower-cased byte-pair encoding, 49,408 ids."""

    name: str = "clip"

    def build(self, *, context_length: int, kept_in: Path | None = None) -> Tokenizer:
        """Make the tokenizer. It needs no file of the run."""
        from clip_train.tokenizer.bpe import ClipTokenizer

        return ClipTokenizer(self.context_length or context_length)


@dataclass(slots=True, kw_only=True)
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The vocabulary of a `tokenizer.json`, for other languages and models. The run keeps a copy of the file."""

    name: str = "huggingface"
    path: str = "???"
    """The `tokenizer.json`."""
    bos: str | None = None
    """Token before each caption, such as `<s>`; null for none."""
    eos: str = "???"
    """Token after each caption, such as `</s>`, where the text tower reads. Its id must not be 2."""
    pad: str | None = None
    """Token that fills a caption up to the context; null: the end token."""
    cleaning: Cleaning = Cleaning.clip
    """Before the file's own rules: `none`; `whitespace` repairs the encoding, unescapes HTML and collapses white space;
    `clip` also lower-cases; `canonicalize` also drops ASCII punctuation, as SigLIP does."""

    def build(self, *, context_length: int, kept_in: Path | None = None) -> Tokenizer:
        """Read the file: the copy in `kept_in` if there is one, which `path` must not contradict."""
        from clip_train.tokenizer.huggingface import FILE_NAME, HuggingFaceTokenizer, read_tokenizer_file

        kept = kept_in / FILE_NAME if kept_in is not None else None
        content, origin = read_tokenizer_file(Path(self.path).expanduser(), kept=kept)
        tokenizer = HuggingFaceTokenizer(
            content, origin=str(origin), context_length=self.context_length or context_length, bos=self.bos,
            eos=self.eos, pad=self.pad, cleaning=self.cleaning.value,
        )  # fmt: skip
        if tokenizer.end_id == REFUSED_END_ID:
            raise UserError(
                f"tokenizer.eos={self.eos} has id {REFUSED_END_ID}, which transformers would misread in an export: "
                "choose another end token, or give it another id in the file"
            )
        return tokenizer


TOKENIZERS: dict[str, type[TokenizerConfig]] = {"clip": ClipTokenizerConfig, "huggingface": HuggingFaceTokenizerConfig}
"""Choice -> dataclass."""
