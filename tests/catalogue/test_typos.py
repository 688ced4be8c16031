"""Fifty random slips in config keys: all refused, the right key named for at least 95 in 100."""

import pytest

from tests.catalogue.typos import all_keys, draw, misspell


@pytest.mark.slow
@pytest.mark.catalogue(1)
def test_fifty_misspelt_keys_are_refused_and_the_right_one_is_named():
    wrong = [draw(seed, all_keys()) for seed in range(50) if not misspell(seed)]
    assert len(wrong) <= 2, wrong
