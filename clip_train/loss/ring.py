"""Send text features round the ranks, so that none ever holds those of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from clip_train.distributed.collectives import ring_shift_async
from clip_train.loss.exchange import graph_is_kept, wire_dtype

if TYPE_CHECKING:
    import torch.distributed as dist

    from clip_train.distributed.collectives import Work
    from clip_train.distributed.world import World


class TextRing:
    """Every rank's text features visit every rank; the gradient that each rank adds follows them one hop behind."""

    def __init__(self, text: Tensor, *, world: World, group: dist.ProcessGroup | None) -> None:
        """Start from this rank's text features [B, D]."""
        self._world, self._group = world, group
        self._rows = text.detach().to(wire_dtype(text)).contiguous()
        self._following: tuple[Tensor, Tensor, Work] | None = None

    def visits(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the rank that owns the visiting features and the features [B, D]; the next ones arrive meanwhile.

        Every rank takes all visits.
        """
        rows = self._rows
        for hop in range(self._world.size):
            owner = (self._world.rank - hop) % self._world.size
            if hop == self._world.size - 1:
                yield owner, rows
                return
            arriving, work = self._shift(rows)
            yield owner, rows
            work.wait()
            rows = arriving

    def add_gradient(self, gradient: Tensor) -> None:
        """Add this rank's part [B, D] of the visitors' gradient and send the sum after them. Once in every visit."""
        if self._following is not None:
            arrived, _, work = self._following
            work.wait()
            gradient = gradient.add_(arrived)
        arriving, work = self._shift(gradient)
        self._following = arriving, gradient, work  # what is being sent has to stay alive

    def _shift(self, values: Tensor) -> tuple[Tensor, Work]:
        arriving, work = ring_shift_async(values, world=self._world, group=self._group)
        return arriving, self._world.stalls.watch(work, device=values.device)

    def gradient(self) -> Tensor:
        """Return the summed gradient [B, D] of this rank's text features, home after the last visit."""
        assert self._following is not None
        arrived, _, work = self._following
        work.wait()
        if not graph_is_kept():
            self._following = None  # who is given the gradient may have its memory
        return arrived
