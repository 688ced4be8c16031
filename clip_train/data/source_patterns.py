"""What `data.train` may say: a pattern, a list of patterns, or a mixture of named sources. Imports no torch."""

from __future__ import annotations

from typing import Any

from clip_train.errors import UserError

TRAIN_SOURCE = "train"


def patterns_by_source(train: object) -> dict[str, tuple[Any, float | None]]:
    """Return patterns and weight of each source. A bare pattern is the source `train`, which fixes its order.

    Raises:
        UserError: it is none of these, or only some sources have a weight.
    """
    if is_patterns(train):
        return {TRAIN_SOURCE: (train, None)}
    if not isinstance(train, dict) or not train:
        raise UserError(f"data.train={train!r} must be a pattern, a list of patterns or {{name: {{shards, weight}}}}")
    sources: dict[str, tuple[Any, float | None]] = {}
    for name, row in train.items():
        if not isinstance(row, dict) or not is_patterns(row.get("shards")) or row.keys() - {"shards", "weight"}:
            raise UserError(f"data.train.{name}={row!r} must have `shards` and may have `weight`, nothing else")
        weight = row.get("weight")
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < float("inf")):
            raise UserError(f"data.train.{name}.weight={weight!r} must be a positive number")
        sources[str(name)] = (row["shards"], weight)
    given = [name for name, (_, weight) in sources.items() if weight is not None]
    if given and len(given) < len(sources):
        raise UserError(f"data.train: give every source a weight or none; only {', '.join(given)} have one")
    return sources


def is_patterns(value: object) -> bool:
    """Return whether a value is a pattern or a list of patterns."""
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)
