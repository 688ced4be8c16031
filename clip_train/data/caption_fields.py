"""Where captions are: the meaning of `data.caption` and `data.caption_weights`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


class CaptionField(NamedTuple):
    """A place that holds captions."""

    extension: str  # of the member, txt or json
    path: tuple[str, ...]  # names of the nested fields, empty for txt
    weight: float  # share of the samples that take their caption here, relative to the other fields


def parse_caption_fields(caption: object, weights: Sequence[float] | None) -> list[CaptionField]:
    """Return the fields that `caption` names, one or a list of them.

    Raises:
        UserError: a field is not understood, or fields and weights do not match.
    """
    names = caption if isinstance(caption, list) else [caption]
    shares = weights or [1.0] * len(names)
    if not names or len(set(map(str, names))) < len(names):
        raise UserError(f"data.caption={caption!r} must name at least one field, and none twice")
    if len(shares) != len(names) or not all(0 < share < float("inf") for share in shares):
        raise UserError(f"data.caption_weights={weights} must be a positive number for each of {names}")
    return [_field(name, share) for name, share in zip(names, shares, strict=True)]


def _field(name: object, weight: float) -> CaptionField:
    if name == "txt":
        return CaptionField("txt", (), weight)
    extension, _, path = str(name).partition(":")
    if extension != "json" or not all(path.split(".")):
        raise UserError(f"data.caption: {name!r} must be txt or json:FIELD, as in json:caption or json:meta.alt")
    return CaptionField("json", tuple(path.split(".")), weight)
