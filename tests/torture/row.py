"""What the torture runner runs: rows of many cases, each with a seed that brings it back."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Outcome(NamedTuple):
    """How one case ended."""

    seed: int  # `python -m tests.torture --rows ROW --case SEED` runs it again
    error: str = ""  # empty: it passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A target that is shown by many cases.

    A module of this folder lists its rows under the name `ROWS`; the runner finds them there.
    """

    number: int
    """As in the table of targets."""
    part: str = ""
    """A letter where one target has several counts, as in `13b`."""
    text: str
    """What is shown, for the table."""
    nightly: int
    """Cases of a full run."""
    run: Callable[[int, int, int], Iterable[Outcome]]
    """`run(start, count, seed)` gives the outcomes of the cases `start` to `start + count - 1` in order. It gives each
    one as it ends, so that an interrupted run keeps it, and does not raise for a case that fails."""

    @property
    def key(self) -> str:
        """Name on the command line and in the results."""
        return f"{self.number}{self.part}"


def each(case: Callable[[int], object]) -> Callable[[int, int, int], Iterator[Outcome]]:
    """Make the function of a row whose cases are independent: `case(seed)` raises if it fails.

    The seed of the i-th case is `seed + i`.
    """

    def run(start: int, count: int, seed: int) -> Iterator[Outcome]:
        for index in range(start, start + count):
            yield outcome_of(case, seed + index)

    return run


def outcome_of(case: Callable[[int], object], seed: int) -> Outcome:
    """Run one case and say how it ended."""
    try:
        case(seed)
    except Exception:
        return Outcome(seed, traceback.format_exc(limit=-4))
    return Outcome(seed)
