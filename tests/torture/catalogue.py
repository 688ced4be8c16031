"""Misspelt config keys: the test of tests/catalogue, at length."""

from collections.abc import Iterator

from tests.catalogue.typos import all_keys, draw, misspell
from tests.torture.row import Outcome, Row, outcome_of

WORST_SHARE = 0.05  # of the keys, for which another one may be named


def misspelt_keys(start: int, count: int, seed: int) -> Iterator[Outcome]:
    """Misspell keys; beyond one in twenty so far, a key for which another one is named is a failure."""
    named: list[bool] = []
    for index in range(start, start + count):
        outcome = outcome_of(lambda one: named.append(misspell(one)), seed + index)
        if not outcome.error and not named[-1] and named.count(False) > max(1, WORST_SHARE * len(named)):
            outcome = Outcome(seed + index, f"another key is named for {draw(seed + index, all_keys())}")
        yield outcome


ROWS = [
    Row(
        number=14,
        text="a misspelt config key is refused in one line within 2 s; the right one is named for at least 95 of 100",
        nightly=300,
        run=misspelt_keys,
    ),
]
