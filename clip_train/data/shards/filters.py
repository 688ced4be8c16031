"""What leaves samples out of an index: conditions on their metadata, and the ledger of a run's unusable samples."""

from __future__ import annotations

import json
import operator
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from clip_train.data.bad import LEDGER_FOLDER, read_ledger
from clip_train.data.images.decode import BadSampleError, open_image
from clip_train.data.index.tar import BLOCK, Member, TarSample
from clip_train.data.index.walk import picture_of
from clip_train.errors import IntegrityError, UserError, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CONDITION = re.compile(r"\s*(?P<field>[^\s<>=!]+)\s*(?P<operator>>=|<=|!=|=|>|<|\bin\b)\s*(?P<value>[^\s<>=].*?)\s*")
_ORDERINGS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
_MEASURES = ("width", "height")  # of the picture, from its header; all other fields but `key` are the json member's
_NAME_BYTES = 100  # of a member's name in its header, which is what a ledger holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`FIELD OPERATOR VALUE`, such as `similarity>=0.3`, `LANGUAGE=en`, `width>=200` or `key in ids.txt`."""

    field: str
    operator: str
    value: str

    def __str__(self) -> str:
        space = " " if self.operator == "in" else ""
        return f"{self.field}{space}{self.operator}{space}{self.value}"

    def holds(self, value: object) -> bool:
        """Say whether a field's value meets the condition; text that is not a number meets no ordering."""
        if self.operator == "in":
            return str(value) in _lines(Path(self.value))
        number, bound = _number(value), _number(self.value)
        if self.operator in _ORDERINGS:
            return number is not None and bound is not None and _ORDERINGS[self.operator](number, bound)
        if isinstance(value, bool):
            equal = value is _TRUTHS.get(self.value.lower())
        elif number is None or bound is None or self.field == "key":  # a key 0001 is not 1
            equal = str(value) == self.value
        else:
            equal = number == bound
        return equal == (self.operator == "=")


def parse_condition(text: str) -> Condition:
    """Read a condition from the command line.

    Raises:
        UserError: it is not one, compares with something that is not a number, or names a list that cannot be read.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UserError(f"--filter {text!r} must be FIELD OPERATOR VALUE, as in 'similarity>=0.3' or 'key in ids.txt'")
    condition = Condition(**match.groupdict())
    if condition.operator in _ORDERINGS and _number(condition.value) is None:
        raise UserError(f"--filter {text!r}: {condition.value!r} is not a number")
    if condition.operator == "in":
        _lines(Path(condition.value))
    return condition


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataRule:
    """Keeps the pairs that meet all conditions. A pair without a field that a condition names meets none."""

    conditions: tuple[Condition, ...]

    def __call__(self, shard: Path, pairs: Sequence[TarSample]) -> list[str | None]:
        """Return for each pair the first condition that it does not meet."""
        fields = {condition.field for condition in self.conditions}
        with shard.open("rb") as file:
            found = [_values(file, pair, fields) for pair in pairs]
        present = {field for values in found for field in values}
        return [self._reason(values, present=present) for values in found]

    def _reason(self, values: dict[str, Any], *, present: set[str]) -> str | None:
        """Return why a pair is left out; if none of its shard has a field, also which ones there are."""
        for condition in self.conditions:
            if values.get(condition.field) is None:
                others = ", ".join(sorted(present - {"key", *_MEASURES})) or "none"
                hint = "" if condition.field in present else f" (in the json members of its shard: {others})"
                return f"no {condition.field}{hint}"
            if not condition.holds(values[condition.field]):
                return f"not {condition}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRule:
    """Leaves out the pairs that a run could not use."""

    reasons: dict[str, dict[str, str]]  # by name of the shard below its source's folder, then by key

    def __call__(self, shard: Path, pairs: Sequence[TarSample]) -> list[str | None]:
        """Return for each pair why the run could not use it."""
        names = ("/".join(shard.parts[-length:]) for length in range(len(shard.parts), 0, -1))
        reasons = next((self.reasons[name] for name in names if name in self.reasons), {})
        if not reasons:
            return [None] * len(pairs)
        with shard.open("rb") as file:
            keys = [_ledger_key(file, shard, pair) for pair in pairs]
        return [f"quarantined, {reasons[key]}" if key in reasons else None for key in keys]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllRules:
    """Leaves out what any of several rules leaves out."""

    rules: tuple[MetadataRule | QuarantineRule, ...]

    def __call__(self, shard: Path, pairs: Sequence[TarSample]) -> list[str | None]:
        """Return for each pair the reason of the first rule that leaves it out."""
        by_rule = [rule(shard, pairs) for rule in self.rules]
        return [next((reason for reason in reasons if reason), None) for reasons in zip(*by_rule, strict=True)]


def read_quarantine(folder: Path, *, source: str | None = None) -> QuarantineRule:
    """Read the ledger of a run's unusable samples.

    Args:
        folder: `RUN/bad`.
        source: of which samples are taken; may be None if the ledger knows one source only.

    Raises:
        UserError: there is no ledger, or it is of several sources and none is chosen.
        IntegrityError: a line of it cannot be read.
    """
    if folder.name != LEDGER_FOLDER or not any(folder.glob("rank-*.jsonl")):
        raise UserError(f"{folder} holds no ledger: name the folder `{LEDGER_FOLDER}` of a run that met bad samples")
    by_source: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    try:
        for row in read_ledger(folder.parent):
            by_source[row["source"]][row["shard"]][row["key"]] = row["reason"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder} holds a line that is not one of a ledger: {error!r}") from error
    if source is None and len(by_source) > 1:
        raise UserError(f"{folder} is of several sources, {', '.join(sorted(by_source))}: pass --source")
    if source is not None and source not in by_source:
        raise UserError(f"{folder} has nothing of source {source!r}, only of {', '.join(sorted(by_source))}")
    chosen = by_source[source] if source is not None else next(iter(by_source.values()), {})
    return QuarantineRule(reasons={shard: dict(keys) for shard, keys in chosen.items()})


def _values(file: BinaryIO, pair: TarSample, fields: set[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if fields - {"key", *_MEASURES} and "json" in pair.members:
        try:
            document = json.loads(_read(file, pair.members["json"]))
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict):
            values.update(document)
    values["key"] = pair.key
    if fields & set(_MEASURES):
        extension = picture_of(pair)
        assert extension is not None
        try:
            values["width"], values["height"] = open_image(_read(file, pair.members[extension])).size
        except BadSampleError:
            values["width"] = values["height"] = None
    return values


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _ledger_key(file: BinaryIO, shard: Path, pair: TarSample) -> str:
    extension = picture_of(pair)
    assert extension is not None
    file.seek(pair.members[extension].offset - BLOCK)
    name = file.read(_NAME_BYTES).split(b"\0", 1)[0].decode(errors="replace")
    return f"{shard.name}/{name}"


@cache
def _lines(path: Path) -> frozenset[str]:
    with reading(f"--filter: the list {path}"):
        return frozenset(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
