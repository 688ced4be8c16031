"""Rank 0 acts on disks and networks; every rank learns the result, or fails with it.

Tools that read shards come here alone, too: torch is imported where several ranks are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar, cast

from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable

    from clip_train.distributed.world import World

T = TypeVar("T")

# Far below the time after which a collective gives up: the others hear from rank 0 all the while.
SECONDS_BETWEEN_SIGNS = 5.0


def on_main(act: Callable[[], T], *, world: World) -> T:
    """Call `act` on rank 0 and return its result, or raise its error, on every rank. Every rank calls this.

    It may take longer than a collective may wait, as an index pass or a download does. With several ranks `act` runs in
    a thread of its own.
    """
    if world.size == 1:
        return act()
    from clip_train.distributed.collectives import broadcast_object

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_on_device, act, world=world) if world.is_main else None
        error: BaseException | None = None
        ended = False
        while not ended:
            result: T | None = None
            told: ClipTrainError | None = None
            if running is not None:
                wait([running], timeout=SECONDS_BETWEEN_SIGNS)
                ended = running.done()
                error = running.exception() if ended else None
                result = running.result() if ended and error is None else None
                if error is not None:
                    # An arbitrary exception may not survive the journey; rank 0 shows it in full.
                    told = error if isinstance(error, ClipTrainError) else ClipTrainError(f"rank 0: {error!r}")
            ended, result, told = broadcast_object((ended, result, told), world=world)
    if error is not None:
        raise error
    if told is not None:
        raise told
    return cast("T", result)


def _on_device(act: Callable[[], T], *, world: World) -> T:
    if world.device.type == "cuda":
        import torch

        torch.cuda.set_device(world.device)  # a new thread starts with device 0
    return act()
