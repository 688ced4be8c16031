"""Choose the caption of a sample, from its `.txt` or from fields of its `.json`."""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from clip_train.data.images.decode import BadSampleError
from clip_train.data.index.files import CAPTION_EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.data.caption_fields import CaptionField

_MAX_BYTES = {"txt": 1 << 16, "json": 1 << 20}
PLACE = "{}"  # where a template takes the caption


class CaptionChooser:
    """Draws one caption of a sample, a pure function of its members and of one number.

    Args:
        fields: where captions are, with the share of samples that each serves.
        template: text around every caption, which replaces `{}`.
    """

    def __init__(self, fields: Sequence[CaptionField], *, template: str = PLACE) -> None:
        self._fields = tuple(fields)
        self._template = template
        extensions = caption_extensions(fields)
        self._members = [extensions.index(field.extension) for field in fields]
        total = sum(field.weight for field in fields)
        self._ends = [end / total for end in accumulate(field.weight for field in fields)]

    def __call__(self, members: Sequence[bytes], *, uniform: float) -> str:
        """Return the caption of a sample.

        Args:
            members: contents of the members that hold captions, in the order of `caption_extensions`.
            uniform: in [0, 1). It decides the field; where in the field's share it lies decides among a list's items.

        Raises:
            BadSampleError: there is no such field, or its text is unusable.
        """
        number = min(bisect_right(self._ends, uniform), len(self._fields) - 1)
        field, content = self._fields[number], members[self._members[number]]
        if field.extension == "txt":
            caption = decode_caption(content)
        else:
            start, end = ([0.0, *self._ends])[number : number + 2]
            caption = _json_caption(content, path=field.path, uniform=(uniform - start) / (end - start))
        return caption if self._template == PLACE else self._template.replace(PLACE, caption)

    def all(self, members: Sequence[bytes]) -> list[str]:
        """Return every caption that a call may draw, without the template.

        Raises:
            BadSampleError: a field is not there, or one of its texts is unusable.
        """
        found: list[str] = []
        for field, number in zip(self._fields, self._members, strict=True):
            if field.extension == "txt":
                found.append(decode_caption(members[number]))
            else:
                found += map(_text, _drawn_from(_json_value(members[number], path=field.path)))
        return found


def caption_extensions(fields: Sequence[CaptionField]) -> tuple[str, ...]:
    """Return the members that fields need, in the order in which an index holds them."""
    needed = {field.extension for field in fields}
    return tuple(extension for extension in CAPTION_EXTENSIONS if extension in needed)


def decode_caption(content: bytes) -> str:
    """Return the caption in a `.txt` member, all of it.

    Raises:
        BadSampleError: it is empty, not UTF-8, or longer than 64 KiB.
    """
    return _clean(_decode(content, limit=_MAX_BYTES["txt"]))


def all_captions(content: bytes, *, field: CaptionField) -> list[str]:
    """Return every caption in a member: the lines of a `.txt`, the items of a field's list.

    Raises:
        BadSampleError: there is none, or one is unusable.
    """
    if field.extension == "txt":
        return [line for line in map(str.strip, decode_caption(content).splitlines()) if line]
    value = _json_value(content, path=field.path)
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _json_caption(content: bytes, *, path: Sequence[str], uniform: float) -> str:
    captions = _drawn_from(_json_value(content, path=path))
    return _text(captions[min(int(uniform * len(captions)), len(captions) - 1)])


def _drawn_from(value: Any) -> list[Any]:
    """Return what a draw chooses among: of a list the items that are not null or blank, if there are any."""
    captions = value if isinstance(value, list) else [value]
    return [item for item in captions if item is not None and not _is_blank(item)] or captions[:1]


def _is_blank(item: object) -> bool:
    return isinstance(item, str) and not item.replace("\0", " ").strip()


def _json_value(content: bytes, *, path: Sequence[str]) -> Any:
    """Return what stands at `path`; a list has items."""
    text = _decode(content, limit=_MAX_BYTES["json"])
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of thousands of brackets
        raise BadSampleError("caption_not_json") from error
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise BadSampleError("caption_missing")
        value = value[name]
    if value == []:
        raise BadSampleError("caption_missing")
    return value


def _text(value: object) -> str:
    if value is None:
        raise BadSampleError("caption_missing")
    if not isinstance(value, str):
        raise BadSampleError("caption_not_text")
    if not value.isascii():
        _require_characters(value)
    return _clean(value)


def _require_characters(caption: str) -> None:
    """JSON can spell halves of surrogate pairs, which no encoding has."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError("caption_not_utf8") from error


def _decode(content: bytes, *, limit: int) -> str:
    if len(content) > limit:
        raise BadSampleError("caption_too_long")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("caption_not_utf8") from error


def _clean(caption: str) -> str:
    caption = caption.replace("\0", " ").strip()
    if not caption:
        raise BadSampleError("caption_empty")
    return caption
