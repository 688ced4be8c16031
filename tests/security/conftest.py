"""The shards and commands of the catalogue."""

from tests.catalogue.conftest import shards, train

__all__ = ["shards", "train"]
