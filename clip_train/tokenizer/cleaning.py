"""Clean captions before they are tokenized. The kinds are open_clip's, each with the same result."""

from __future__ import annotations

import html
import string
from collections.abc import Callable

import ftfy
import regex

_SPACE = regex.compile(r"\s+")
# Nothing that ftfy or html.unescape would touch: printable ASCII without `&`, tab and newline.
_PLAIN = regex.compile(r"[\t\n -%'-~]*")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def whitespace(text: str) -> str:
    """Repair the encoding, unescape HTML twice, collapse white space."""
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text).strip()


def clip(text: str) -> str:
    """Clean as `whitespace` does, and lower-case: CLIP's cleaning, which open_clip calls `lower`."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Repair, unescape, drop ASCII punctuation, lower-case, collapse white space: SigLIP's (big_vision)."""
    text = whitespace(text).replace("_", " ").translate(_PUNCTUATION).lower()
    return _SPACE.sub(" ", text).strip()


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": whitespace,
    "clip": clip,
    "canonicalize": canonicalize,
}
