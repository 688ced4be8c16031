"""CLIP's byte-pair encoding.

The rule is OpenAI CLIP's (Radford et al. 2021, `simple_tokenizer.py`): clean, lower-case, split into words with one
regular expression, spell each word in UTF-8 bytes, and join neighbouring symbols by the learned merges, lowest rank
first. Ids: 256 bytes, the same 256 at a word's end, 48,894 merges in rank order, the start and the end token. One
deliberate difference: text that spells a special token (`<|endoftext|>`) is encoded as the characters it consists of,
so no caption can end itself.
"""

from __future__ import annotations

import gzip
import re
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import regex
from torch import Tensor

from clip_train.tokenizer.base import Tokenizer
from clip_train.tokenizer.cleaning import clip as clean

MERGES_FILE = Path(__file__).parent / "data" / "bpe_merges.txt.gz"
NUM_BYTES = 256
CACHED_WORDS = 1 << 16

_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# Latin letters need no table of Unicode, and so the faster engine will do. The long s is left out: it is an s above.
_LATIN = re.compile(r"[\x00-\x7f\xdf-\xf6\xf8-\u017e]*")
_LATIN_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z\xdf-\xf6\xf8-\u017e]+|[0-9]|[^ a-z0-9\xdf-\xf6\xf8-\u017e]+")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


class ClipTokenizer(Tokenizer):
    """Turn captions into CLIP token ids. Instances can be pickled and are cheap to copy to workers."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self._merges, self._symbols, self._byte_ids = _vocabulary()
        self.start_id = len(self._symbols)
        self.end_id = self.start_id + 1
        self.pad_id = 0
        self.vocab_size = self.end_id + 1
        # Bounded: a loader's worker sees new words for as long as it lives.
        self._word_ids = lru_cache(maxsize=CACHED_WORDS)(self._merge_word)

    def __reduce__(self) -> tuple[type[ClipTokenizer], tuple[int]]:
        return ClipTokenizer, (self.context_length,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without start and end token. Never contains a special id."""
        ids: list[int] = []
        cleaned = clean(text)  # lower case, no white space but single spaces
        for word in (_LATIN_WORD if _LATIN.fullmatch(cleaned) else _WORD).findall(cleaned):
            ids += self._word_ids(word)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` up to the end token, in the tokenizer's cleaned spelling."""
        content = [int(i) for i in ids]
        if self.end_id in content:
            content = content[: content.index(self.end_id)]
        spelled = b"".join(self._symbols[i] for i in content if i != self.start_id)
        return spelled.decode("utf-8", errors="replace").rstrip(" ")

    def _merge_word(self, word: str) -> tuple[int, ...]:
        ids = [self._byte_ids[byte] for byte in word.encode("utf-8")]
        ids[-1] += NUM_BYTES  # the last byte carries the word-end mark
        while len(ids) > 1:
            # A merge's id grows with its rank, so the lowest id is the merge to apply.
            best = min((self._merges.get(pair, self.vocab_size), pair) for pair in pairwise(ids))
            if best[0] == self.vocab_size:
                break
            ids = _apply_merge(ids, best[1], best[0])
        return tuple(ids)


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Tokenize as `clip.tokenize` of OpenAI CLIP: int64 [n, context_length].

    Raises:
        CaptionTooLong: a caption does not fit and `truncate` is False; a RuntimeError, as OpenAI CLIP's.
    """
    return _shared_tokenizer()(texts, context_length=context_length, truncate=truncate)


@cache
def _shared_tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


def _apply_merge(ids: list[int], pair: tuple[int, int], merged: int) -> list[int]:
    joined = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            joined.append(merged)
            i += 2
        else:
            joined.append(ids[i])
            i += 1
    return joined


def byte_letters() -> list[str]:
    """Return the printable character that stands for each byte in files of merges, in the order of the ids 0 to 255."""
    letters = [chr(byte) for byte in _PRINTABLE]
    return letters + [chr(NUM_BYTES + i) for i in range(NUM_BYTES - len(letters))]


def merge_lines() -> list[str]:
    """Return the 48,894 merges, lowest rank first, as two spellings with a space between them."""
    return gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").splitlines()


@cache
def _vocabulary() -> tuple[dict[tuple[int, int], int], list[bytes], list[int]]:
    """Return merges (pair of ids to id), the bytes each id spells (a space ends a word), and the id of each byte."""
    byte_order = _PRINTABLE + [byte for byte in range(NUM_BYTES) if byte not in _PRINTABLE]
    # The file spells byte number i of the order with its own character if printable, else with the next one past 255.
    letters = byte_letters()
    ids = {letter: i for i, letter in enumerate(letters)} | {f"{c}</w>": NUM_BYTES + i for i, c in enumerate(letters)}
    symbols = [bytes([byte]) for byte in byte_order] + [bytes([byte, 32]) for byte in byte_order]
    merges = {}
    for line in merge_lines():
        left, right = line.split(" ")
        merges[ids[left], ids[right]] = ids[left + right] = len(symbols)
        symbols.append(symbols[ids[left]] + symbols[ids[right]])
    byte_ids = [0] * NUM_BYTES
    for i, byte in enumerate(byte_order):
        byte_ids[byte] = i
    return merges, symbols, byte_ids
