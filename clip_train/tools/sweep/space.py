"""The space of a sweep: a range of values for each key that it varies."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.config import flat_values, flatten, parse_yaml
from clip_train.errors import UserError, reading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna import Trial

SPACE_PREFIX = "sweep.space."
_SYNTAX = "log(LOW,HIGH), uniform(LOW,HIGH), int(LOW,HIGH) or choice(A,B,…)"
_OF_THE_SWEEP = ("name", "run_dir", "resume")  # each trial has its own


class Kind(StrEnum):
    """How the values of a range lie."""

    log = "log"
    uniform = "uniform"
    int = "int"
    choice = "choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The values that one key may take."""

    key: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    """Each as it stands after `KEY=`."""

    def __str__(self) -> str:
        inside = self.choices if self.kind is Kind.choice else (self.text(self.low), self.text(self.high))
        return f"{self.kind.value}({','.join(inside)})"

    def suggest(self, trial: Trial) -> None:
        """Have Optuna choose a value for its trial, once."""
        if self.kind is Kind.choice:
            trial.suggest_categorical(self.key, self.choices)
        elif self.kind is Kind.int:
            trial.suggest_int(self.key, int(self.low), int(self.high))
        else:
            trial.suggest_float(self.key, self.low, self.high, log=self.kind is Kind.log)

    def text(self, value: float | str) -> str:
        """Return a value as it stands after `KEY=`: six digits of a number are enough to find it again."""
        if isinstance(value, str):
            return value
        return str(int(value)) if self.kind is Kind.int else f"{value:.6g}"

    def share(self, value: str) -> float:
        """Return where a value lies, from 0 at the low end to 1 at the high end."""
        if self.kind is Kind.choice:
            return self.choices.index(value) / (len(self.choices) - 1)
        low, high, place = self.low, self.high, float(value)
        if self.kind is Kind.log:
            low, high, place = math.log(low), math.log(high), math.log(place)
        return min(1.0, max(0.0, (place - low) / (high - low)))

    @property
    def samples(self) -> tuple[str, ...]:
        """Values that a config must accept if it is to accept all: both ends, or every choice."""
        return self.choices if self.kind is Kind.choice else (self.text(self.low), self.text(self.high))


def parse_space(space: Any, *, given: Mapping[str, str]) -> list[Range]:
    """Return the ranges of a sweep in the order in which they were named.

    Args:
        space: `sweep.space`: a mapping or the path of a YAML file with one, keys dotted or nested; None.
        given: ranges of the command line by key, which come before those of the file.

    Raises:
        UserError: nothing is to be varied, the file cannot be read, or a range is not one; the key is named.
    """
    named = {**_read(space), **given}
    if not named:
        raise UserError(
            f'sweep.space.KEY= is missing: name what to vary, as in "sweep.space.optim.lr=log(1e-5,1e-2)"; {_SYNTAX}'
        )
    return [parse_range(key, text) for key, text in named.items()]


def _read(space: Any) -> dict[str, str]:
    if isinstance(space, str):
        path = Path(space).expanduser()
        with reading(f"sweep.space={space}"):
            text = path.read_text(encoding="utf-8")
        space = flat_values(parse_yaml(text, origin=str(path)))
    if space is not None and not isinstance(space, dict):
        raise UserError(f"sweep.space={space} is neither a file nor ranges by key")
    return {key: str(value) for key, value in flatten(space or {}).items()}


def parse_range(key: str, text: str) -> Range:
    """Read one range.

    Raises:
        UserError: the key is one that each trial has for itself, or the text is no range; both are named.
    """
    where = f"{SPACE_PREFIX}{key}={text}"
    if key in _OF_THE_SWEEP:
        raise UserError(f"{where}: each trial has a {key} of its own")
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, flags=re.DOTALL)
    if not found or found[1] not in Kind.__members__:
        raise UserError(f"{where} is no range: {_SYNTAX}")
    kind = Kind(found[1])
    if kind is Kind.choice:
        return Range(key=key, kind=kind, choices=_choices(found[2], where=where))
    try:
        low, high = (float(part) for part in found[2].split(","))
    except ValueError as error:
        raise UserError(f"{where}: {kind.value} takes two numbers, as in {kind.value}(LOW,HIGH)") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{where}: LOW must be below HIGH, both finite")
    if kind is Kind.log and low <= 0:
        raise UserError(f"{where}: LOW must be above 0 in log(LOW,HIGH)")
    if kind is Kind.int and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{where}: int takes whole numbers")
    return Range(key=key, kind=kind, low=low, high=high)


def _choices(inside: str, *, where: str) -> tuple[str, ...]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={inside}")
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {reason}; a value with special characters needs quotes") from error
    values = tuple(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else ()
    if len(set(values)) != len(values) or len(values) < 2:
        raise UserError(f"{where}: choice takes two or more different values, as in choice(A,B)")
    return values
