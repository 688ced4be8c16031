"""Symmetric InfoNCE over all ranks: text features gathered once, logits in tiles, never the whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed.collectives import all_gather, all_reduce
from clip_train.loss.base import ContrastiveLoss
from clip_train.loss.exchange import Pairs, TextExchange, no_gradient_yet
from clip_train.loss.fused import logit_tiles
from clip_train.loss.tiles import LineSums, LogitTiles, finite

if TYPE_CHECKING:
    import torch.distributed as dist

    from clip_train.distributed.world import World
    from clip_train.types import Features

SMALL_EXCHANGE_BYTES = 4 * 2**20


class ClipLoss(ContrastiveLoss):
    """Symmetric InfoNCE with a learned temperature (CLIP, Radford et al. 2021, §2.3), exact for any number of ranks.

    On one rank it is, for image and text features x, y [B, D] of unit length:
        logits = exp(logit_scale) * x @ y.T  # [B, B]
        labels = arange(B)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    Every rank holds its own image features [B, D] and gathers the text features of all [G, D]; it computes its rows of
    the logits tile by tile, once forward and once more backward. The image gradient needs no communication, the text
    gradient one reduce-scatter, the temperature's is a dot product. Memory grows with G·D; results repeat bit for bit.
    One-sided gathers and tiled InfoNCE are known (Inf-CL, Cheng et al. 2024; DisCo-CLIP, Chen et al. 2023).
    """

    def __init__(self, *, world: World, ignore_duplicates: bool = False, tile: tuple[int, int] | None = None) -> None:
        """Called by every rank.

        ignore_duplicates: equal captions elsewhere in the batch are neither positives nor negatives.
        tile: rows and columns of a tile; by default chosen for the device.
        """
        super().__init__(world=world, ignore_duplicates=ignore_duplicates)
        self._tile = tile

    def _evaluate(self, features: Features, exchange: TextExchange, pairs: Pairs) -> tuple[Tensor, Tensor]:
        problem = _Problem(exchange, pairs, self._world, self._group, self._tile)
        loss, recall = _OneSidedInfoNCE.apply(features.image, features.text, features.logit_scale, problem)
        return loss, recall


class _Problem(NamedTuple):
    """What one evaluation works on besides the differentiable inputs."""

    exchange: TextExchange
    pairs: Pairs
    world: World
    group: dist.ProcessGroup | None
    tile: tuple[int, int] | None

    def tiles(self, image: Tensor, text: Tensor, scale: Tensor) -> LogitTiles:
        """Return the tiles of this rank's rows of the logits."""
        first = self.world.rank * len(image)
        return logit_tiles(image, text, scale=scale, pairs=self.pairs, first=first, tile=self.tile)


class _OneSidedInfoNCE(torch.autograd.Function):
    """loss = N/2V · Σ over own pairs of R_i - S_ii + C_i - S_ii, with V pairs on N ranks and R, C log-sums of S."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        world, pairs = problem.world, problem.pairs
        all_text = problem.exchange.rows()  # [G, D]
        scale = logit_scale.exp().to(pairs.num_valid.dtype)
        rows, columns, own = _log_sums(problem.tiles(image, all_text, scale))
        best = own >= rows.maximum  # ahead of every other caption
        row_log_sum = rows.log()  # [B]
        column_log_sum = _over_ranks(columns, world=world, group=problem.group).log()  # [G]

        first = world.rank * len(image)
        terms = row_log_sum + column_log_sum[first : first + len(image)] - 2 * own
        if pairs.valid is not None and pairs.all_valid is not None:
            terms, best = terms.masked_fill(~pairs.valid, 0.0), best & pairs.valid
            row_log_sum = row_log_sum.masked_fill(~pairs.valid, torch.inf)  # exp(S - inf) = 0: no gradient from padding
            column_log_sum = column_log_sum.masked_fill(~pairs.all_valid, torch.inf)
        ctx.save_for_backward(image, all_text, row_log_sum, column_log_sum, scale)
        ctx.problem, ctx.types = problem, (image.dtype, logit_scale.dtype)
        ctx.text_gradient = no_gradient_yet(text)
        recall = world.size * best.sum() / pairs.num_valid
        ctx.mark_non_differentiable(recall)
        return world.size * terms.sum() / (2 * pairs.num_valid), recall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        image, all_text, row_log_sum, column_log_sum, scale = ctx.saved_tensors
        problem: _Problem = ctx.problem
        needs_image, needs_text, needs_scale, _ = ctx.needs_input_grad
        with torch.autocast(image.device.type, enabled=False):
            tiles = problem.tiles(image, all_text, scale)
            of_text = torch.zeros_like(all_text, dtype=scale.dtype) if needs_text else None
            # The temperature's gradient is read off either side; a frozen image tower leaves the text's.
            of_image = torch.zeros_like(image, dtype=scale.dtype) if needs_image or not needs_text else None
            for tile in tiles:
                tiles.add_products(tiles.gradient(*tile, row_log_sum, column_log_sum), of_image, of_text, *tile)
            # All factors come after the products, whose entries in [-2, 2] suit short types.
            factor = gradient * problem.world.size * scale / (2 * problem.pairs.num_valid)
            of_scale = None
            if needs_scale and of_image is not None:
                of_scale = (tiles.dot_image(of_image) * factor).to(ctx.types[1])
            elif needs_scale and of_text is not None:
                of_scale = (tiles.dot_text(of_text) * factor).to(ctx.types[1])
            if of_text is not None:
                problem.exchange.start_scatter(of_text)
                problem.exchange.set_scale(factor)
            image_gradient = of_image.mul_(factor).to(ctx.types[0]) if of_image is not None and needs_image else None
        return image_gradient, ctx.text_gradient if needs_text else None, of_scale, None


def _log_sums(tiles: LogitTiles) -> tuple[LineSums, LineSums, Tensor]:
    """Return the sums over rows [B] and, for this rank's rows only, over columns [G], and the own logits S_ii [B]."""
    rows = LineSums.of_nothing(len(tiles.image), like=tiles.scale)
    columns = LineSums.of_nothing(len(tiles.text), like=tiles.scale)
    own = tiles.scale.new_empty(len(tiles.image))
    for tile in tiles:
        tiles.add_sums((rows, columns), own, *tile)
    return rows, columns, own


def _over_ranks(columns: LineSums, *, world: World, group: dist.ProcessGroup | None) -> LineSums:
    """Combine the column sums of all ranks. Called by every rank; each gets the same bits."""
    if world.size == 1:
        return columns
    stacked = torch.stack(columns)  # [2, G]
    if world.size * stacked.nbytes <= SMALL_EXCHANGE_BYTES:
        everyone = all_gather(stacked[None], world=world, group=group)  # [N, 2, G]
        maximum = everyone[:, 0].amax(0)
        total = (everyone[:, 1] * (everyone[:, 0] - finite(maximum)).exp()).sum(0)
    else:
        maximum = all_reduce(columns.maximum.clone(), world=world, op="max", group=group)
        total = columns.total * (columns.maximum - finite(maximum)).exp()
        total = all_reduce(total, world=world, group=group)
    return LineSums(maximum, total)
