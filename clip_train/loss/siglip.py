"""Pairwise sigmoid loss over all ranks: one pass over the tiles gives the value and all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.loss.base import ContrastiveLoss
from clip_train.loss.exchange import Pairs, TextExchange, no_gradient_yet, scaled
from clip_train.loss.fused import logit_tiles
from clip_train.loss.ring import TextRing
from clip_train.loss.tiles import LogitTiles

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.types import Features


class SigLipLoss(ContrastiveLoss):
    """Sigmoid loss with learned scale and bias (SigLIP, Zhai et al. 2023, §3.2), exact for any number of ranks.

    With U = scale·<x, y> + bias, the loss is the sum of -log σ(U) over pairs and of -log σ(-U) over all others, divided
    by the number of pairs. No pair needs another's logit, so each tile is computed once, and no logits are kept.
    """

    def __init__(
        self,
        *,
        world: World,
        ring: bool = False,
        ignore_duplicates: bool = False,
        tile: tuple[int, int] | None = None,
    ) -> None:
        """Called by every rank.

        ring: pass text features from rank to rank, holding those of two, instead of gathering those of all.
        ignore_duplicates: equal captions elsewhere in the batch are neither positives nor negatives.
        tile: rows and columns of a tile; by default chosen for the device.
        """
        super().__init__(world=world, ignore_duplicates=ignore_duplicates)
        self._ring, self._tile = ring, tile

    def _start(self, text: Tensor) -> tuple[Tensor, TextExchange | TextRing]:
        if self._ring:
            return text, TextRing(text, world=self._world, group=self._group)
        return super()._start(text)

    def _evaluate(self, features: Features, exchange: TextExchange | TextRing, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if features.logit_bias is None:
            raise ValueError("the sigmoid loss needs a model with a logit_bias")
        problem = _Problem(exchange, pairs, self._world, self._tile, torch.is_grad_enabled())
        loss, recall = _Sigmoid.apply(*features, problem)
        return loss, recall


class _Problem(NamedTuple):
    """What one evaluation works on besides the differentiable inputs."""

    exchange: TextExchange | TextRing
    pairs: Pairs
    world: World
    tile: tuple[int, int] | None
    differentiate: bool

    def pairs_with(self, owner: int, size: int) -> Pairs:
        """Return the masks against the captions [B] of one rank."""
        columns = slice(owner * size, (owner + 1) * size)
        valid, ids = self.pairs.all_valid, self.pairs.all_ids
        return self.pairs._replace(
            all_valid=None if valid is None else valid[columns], all_ids=None if ids is None else ids[columns]
        )


class _Totals:
    """What one pass over the tiles adds up, before the common factor."""

    def __init__(self, image: Tensor, *, like: Tensor, differentiate: bool) -> None:
        self.loss = like.new_zeros(())
        self.of_bias = like.new_zeros(())
        self.of_image = torch.zeros_like(image, dtype=like.dtype) if differentiate else None
        self.row_maximum = like.new_full((len(image),), -torch.inf)
        self.own = like.new_empty(len(image))

    def take(self, tiles: LogitTiles) -> Tensor | None:
        """Add all tiles; return the gradient of their text features, if asked for."""
        of_text = torch.zeros_like(tiles.text, dtype=self.loss.dtype) if self.of_image is not None else None
        for rows, columns in tiles:
            sums = tiles.sigmoid(self.own, rows, columns, differentiate=self.of_image is not None)
            torch.maximum(self.row_maximum[rows], sums.row_maximum, out=self.row_maximum[rows])
            self.loss += sums.loss
            self.of_bias += sums.gradient_sum
            if sums.gradient is not None:
                tiles.add_products(sums.gradient, self.of_image, of_text, rows, columns)
            del sums  # before the next tile takes memory
        return of_text


class _Sigmoid(torch.autograd.Function):
    """loss = N/V · Σ over own rows of log(1 + exp(±U)), with V pairs on N ranks."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, problem: _Problem
    ) -> tuple[Tensor, Tensor]:
        world, pairs, exchange = problem.world, problem.pairs, problem.exchange
        scale, bias = logit_scale.exp().to(pairs.num_valid.dtype), logit_bias.to(pairs.num_valid.dtype)
        differentiate = problem.differentiate and any(ctx.needs_input_grad[:4])

        def tiles(all_text: Tensor, *, pairs: Pairs, first: int) -> LogitTiles:
            return logit_tiles(image, all_text, scale=scale, bias=bias, pairs=pairs, first=first, tile=problem.tile)

        totals = _Totals(image, like=scale, differentiate=differentiate)
        if isinstance(exchange, TextRing):
            for owner, visitors in exchange.visits():
                first = 0 if owner == world.rank else len(visitors)
                visited = tiles(visitors, pairs=problem.pairs_with(owner, len(visitors)), first=first)
                of_text = totals.take(visited)
                if of_text is not None:
                    exchange.add_gradient(of_text)
        else:
            visited = tiles(exchange.rows(), pairs=pairs, first=world.rank * len(image))
            of_text = totals.take(visited)
            if of_text is not None and ctx.needs_input_grad[1]:
                exchange.start_scatter(of_text)

        best = totals.own >= totals.row_maximum
        if pairs.valid is not None:
            best = best & pairs.valid
        if totals.of_image is not None:
            of_scale = visited.dot_image(totals.of_image)
            ctx.save_for_backward(totals.of_image, scale, of_scale, totals.of_bias)
        ctx.problem, ctx.text_gradient = problem, no_gradient_yet(text)
        ctx.types = image.dtype, text.dtype, logit_scale.dtype, logit_bias.dtype
        recall = world.size * best.sum() / pairs.num_valid
        ctx.mark_non_differentiable(recall)
        return world.size * totals.loss / pairs.num_valid, recall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_image, scale, of_scale, of_bias = ctx.saved_tensors
        problem: _Problem = ctx.problem
        needs_image, needs_text, needs_scale, needs_bias, _ = ctx.needs_input_grad
        common = gradient * problem.world.size / problem.pairs.num_valid
        text_gradient = None
        exchange = problem.exchange
        if needs_text and isinstance(exchange, TextRing):
            text_gradient = scaled(exchange.gradient(), common * scale).to(ctx.types[1])
        elif needs_text and isinstance(exchange, TextExchange):
            exchange.set_scale(common * scale)
            text_gradient = ctx.text_gradient
        return (
            scaled(of_image, common * scale).to(ctx.types[0]) if needs_image else None,
            text_gradient,
            (of_scale * common * scale).to(ctx.types[2]) if needs_scale else None,
            (of_bias * common).to(ctx.types[3]) if needs_bias else None,
            None,
        )
