"""The layouts that `shards make` writes."""

from enum import StrEnum


class Layout(StrEnum):
    """How the shards of a set lie and what their samples hold."""

    train = "train"
    """Indexed shards of pairs, shuffled, below `train/` and `val/`."""
    eval = "eval"
    """clip-benchmark's `wds/` layout of an evaluation set."""
