"""The ranks that write the files of one checkpoint together, each its own, while training goes on."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch.distributed as dist

from clip_train.distributed.collectives import gather_objects
from clip_train.distributed.world import World
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_SECONDS = 1800.0  # for the slowest rank to write its files

T = TypeVar("T")


class Writers:
    """Ranks with a process group of their own: saving threads must not meet where training exchanges gradients."""

    def __init__(self, *, world: World) -> None:
        """Make the group. Every rank calls this."""
        self.world = world
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    @staticmethod
    def alone() -> Writers:
        """Return one rank that writes everything."""
        return Writers(world=World())

    def agree(self, act: Callable[[], T]) -> list[T]:
        """Call `act` on every rank and return all results in rank order, or raise the first error on every rank.

        Raises:
            OSError: of some rank.
            ClipTrainError: of some rank, or what else one raised.
        """
        if self.world.size == 1:
            return [act()]
        result: T | None = None
        failed: Exception | None = None
        try:
            result = act()
        except (OSError, ClipTrainError) as error:
            failed = error
        except Exception as error:
            failed = ClipTrainError(f"rank {self.world.rank}: {error!r}")  # others may not survive the journey
        of_all = gather_objects((result, failed), world=self.world, group=self._group)
        for _, first in of_all:
            if first is not None:
                raise first
        return [cast("T", value) for value, _ in of_all]
