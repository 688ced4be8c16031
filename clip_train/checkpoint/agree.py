"""Rank 0 acts on the disk; every rank learns the result, or fails with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from clip_train.distributed.collectives import broadcast_object
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable

    from clip_train.distributed.world import World

T = TypeVar("T")


def on_main(act: Callable[[], T], *, world: World) -> T:
    """Call `act` on rank 0 and return its result, or raise its error, on every rank. Every rank calls this."""
    result: T | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            result = act()
        except Exception as raised:
            error = raised
    # An arbitrary exception may not survive the journey; rank 0 shows it in full.
    told = error if error is None or isinstance(error, ClipTrainError) else ClipTrainError(f"rank 0: {error!r}")
    result, told = broadcast_object((result, told), world=world)
    if error is not None:
        raise error
    if told is not None:
        raise told
    return cast("T", result)
