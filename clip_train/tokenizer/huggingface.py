"""Any `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

from clip_train.errors import UserError, reading
from clip_train.tokenizer.base import Tokenizer
from clip_train.tokenizer.cleaning import CLEANERS

FILE_NAME = "tokenizer.json"


class HuggingFaceTokenizer(Tokenizer):
    """The vocabulary and rules of a `tokenizer.json`, with start, end and padding tokens of one's own choice.

    Attributes:
        bos, eos, pad: spelling of the start token (None for none), the end token and the padding.
        cleaning: one of `CLEANERS`.

    The file's own padding, truncation and template of special tokens are not used. Text that spells a special token is
    encoded as its characters.
    """

    def __init__(
        self, content: str, *, origin: str, context_length: int, bos: str | None, eos: str, pad: str | None,
        cleaning: str,
    ) -> None:  # fmt: skip
        """Read the JSON.

        Args:
            content: of the file.
            origin: its name, for messages.
            context_length: L.
            bos, eos, pad: spelling of the start token (None for none), the end token and the padding (None: the end's).
            cleaning: one of `CLEANERS`.

        Raises:
            UserError: it is no tokenizer, or does not know a special token.
        """
        from tokenizers import Tokenizer as Backend

        self._arguments = (content, origin, context_length, bos, eos, pad, cleaning)
        try:
            self._backend = Backend.from_str(content)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{origin}: not a tokenizer.json ({error})") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._clean = CLEANERS[cleaning]
        ids = self._backend.get_vocab(with_added_tokens=True)
        self.context_length = context_length
        self.vocab_size = max(ids.values()) + 1
        self.start_id = None if bos is None else _id_of(bos, ids, key="bos", origin=origin)
        self.end_id = _id_of(eos, ids, key="eos", origin=origin)
        self.pad_id = self.end_id if pad is None else _id_of(pad, ids, key="pad", origin=origin)
        self._special = {self.start_id, self.end_id}
        self.bos, self.eos, self.pad, self.cleaning = bos, eos, eos if pad is None else pad, cleaning

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, self._arguments

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without start and end token. Never contains either."""
        ids = self._backend.encode(self._clean(text), add_special_tokens=False).ids
        return [i for i in ids if i not in self._special]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` up to the end token, in the tokenizer's cleaned spelling."""
        content = [int(i) for i in ids]
        if self.end_id in content:
            content = content[: content.index(self.end_id)]
        return self._backend.decode([i for i in content if i != self.start_id], skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        """Return `tokenizer.json` as it was read."""
        return {FILE_NAME: self._arguments[0].encode()}


def read_tokenizer_file(path: Path, *, kept: Path | None) -> tuple[str, Path]:
    """Return the content of a tokenizer file and where it was read.

    Args:
        path: the file that the config names.
        kept: the copy in the run's directory, if there may be one: it counts, and the named file may then be gone.

    Raises:
        UserError: there is no such file, or it is not the one that the run began with.
    """
    with reading(f"tokenizer.path={path}"):
        if kept is None or not kept.exists():
            return path.read_text(encoding="utf-8"), path
        content = kept.read_text(encoding="utf-8")
        changed = path.exists() and path.read_text(encoding="utf-8") != content
    if changed:
        raise UserError(f"tokenizer.path={path} is not the file that this run began with, which is kept as {kept}")
    return content, kept


def _rebuild(
    content: str, origin: str, context_length: int, bos: str | None, eos: str, pad: str | None, cleaning: str
) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(
        content, origin=origin, context_length=context_length, bos=bos, eos=eos, pad=pad, cleaning=cleaning
    )


def _id_of(token: str, ids: dict[str, int], *, key: str, origin: str) -> int:
    if token not in ids:
        raise UserError(f"tokenizer.{key}={token}: no such token in {origin}")
    return ids[token]
