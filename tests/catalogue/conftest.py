"""A set of shards to give to commands."""

import pytest

from tests.catalogue import commands
from tests.data.made import numbered_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder `train` with two shards of 60 and a folder `val` with one of 20."""
    folder = tmp_path_factory.mktemp("catalogue")
    numbered_shards(folder / "train", [60, 60])
    numbered_shards(folder / "val", [20])
    return folder


@pytest.fixture
def train(shards, tmp_path):
    """Train on them; arguments are those of the command line."""
    return lambda *arguments: commands.train(shards / "train", tmp_path / "run", *arguments)
