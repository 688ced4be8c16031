"""The matrix of logits, tile by tile: its size never matters to memory.

Rows are this rank's images [B], columns the captions of all ranks [G]. A tile is named by two slices. Two buffers of
one tile's size are reused throughout, because on a CPU fresh memory costs as much time as the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clip_train.loss.exchange import Pairs

TILE = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


class LineSums(NamedTuple):
    """Σ exp(logit) of every line, as maximum and total: log-sum = maximum + log(total), safe at any scale."""

    maximum: Tensor  # [lines], -inf for a line without logits
    total: Tensor  # [lines], Σ exp(logit - maximum)

    @classmethod
    def of_nothing(cls, lines: int, *, like: Tensor) -> LineSums:
        """Return the sums of `lines` empty lines."""
        return cls(like.new_full((lines,), -torch.inf), like.new_zeros(lines))

    def add(self, lines: slice, other: LineSums) -> None:
        """Add `other` to these `lines`, in place."""
        maximum, total = self.maximum[lines], self.total[lines]
        merged = torch.maximum(maximum, other.maximum)
        base = finite(merged)
        total.mul_((maximum - base).exp_()).add_(other.total * (other.maximum - base).exp_())
        maximum.copy_(merged)

    def log(self) -> Tensor:
        """Return log Σ exp [lines], -inf for a line without logits."""
        return self.maximum + self.total.log()


class TileSums(NamedTuple):
    """What the forward pass keeps of a tile."""

    rows: LineSums
    columns: LineSums
    own: Tensor | None  # logits of the pairs that belong together, where the tile holds some


def finite(maximum: Tensor) -> Tensor:
    """Return `maximum` with 0 for -inf: in a line that is masked throughout, inf - inf must not occur."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


class LogitTiles:
    """Tiles of scale·X·Yᵀ + bias, with -inf where a pair does not count."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        *,
        scale: Tensor,
        pairs: Pairs,
        first: int,
        bias: Tensor | None = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        """Prepare the buffers.

        image: [B, D] and text: [G, D] in the type of the products; scale and bias: [] in the type of the sums;
        first: the column of this rank's first pair.
        """
        self.image, self.text, self.scale, self.pairs = image, text, scale, pairs
        self._first, self._bias = first, bias
        most_rows, most_columns = tile or TILE[image.device.type]
        self._block = min(most_rows, len(image)), min(most_columns, len(text))
        # CUDA multiplies short types straight into float32; elsewhere they are converted block by block.
        self._mixed = image.is_cuda and image.dtype != scale.dtype
        self._buffers = None if self._mixed else scale.new_empty(2, self._block[0] * self._block[1])
        self._row_bias = self._column_bias = None
        if pairs.valid is not None and pairs.all_valid is not None:
            self._row_bias, self._column_bias = (
                scale.new_zeros(valid.shape).masked_fill_(~valid, -torch.inf)
                for valid in (pairs.valid, pairs.all_valid)
            )
        self._scaled: tuple[int, Tensor] | None = None  # scaled features of the row block at work

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the tiles row by row, as (rows, columns)."""
        for i in range(0, len(self.image), self._block[0]):
            for j in range(0, len(self.text), self._block[1]):
                yield (
                    slice(i, min(i + self._block[0], len(self.image))),
                    slice(j, min(j + self._block[1], len(self.text))),
                )

    def sums(self, rows: slice, columns: slice) -> TileSums:
        """Return the sums of exp along the rows and along the columns of one tile."""
        logits = self.logits(rows, columns)
        scratch = self.buffer(1, logits.shape)
        own = self.own(logits, rows, columns)
        row_maximum, column_maximum = logits.amax(1), logits.amax(0)
        row_total = torch.sub(logits, finite(row_maximum)[:, None], out=scratch).exp_().sum(1)
        column_total = torch.sub(logits, finite(column_maximum), out=scratch).exp_().sum(0)
        return TileSums(
            LineSums(row_maximum, row_total),
            LineSums(column_maximum, column_total),
            None if own is None else own.clone(),
        )

    def gradient(self, rows: slice, columns: slice, row_log_sum: Tensor, column_log_sum: Tensor) -> Tensor:
        """Return exp(S - R) + exp(S - C) - 2δ of one tile: its entries lie in [-2, 2].

        row_log_sum: [B], column_log_sum: [G], +inf for padding.
        """
        logits = self.logits(rows, columns)
        scratch = self.buffer(1, logits.shape)
        torch.sub(logits, row_log_sum[rows, None], out=scratch).exp_()
        gradient = logits.sub_(column_log_sum[columns]).exp_().add_(scratch)
        own = self.own(gradient, rows, columns)
        if own is not None:
            own.sub_(2.0 if self.pairs.valid is None else 2.0 * self.pairs.valid[self.own_rows(rows, columns)])
        return gradient

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits of one tile [I, J] in the type of the sums. The next call overwrites them."""
        if self._mixed:
            logits = self.product(rows, columns).mul_(self.scale)
            for addend in self._addends(rows, columns):
                logits.add_(addend)
        else:
            logits = self._product_in_buffer(rows, columns)
        if self.pairs.ids is not None and self.pairs.all_ids is not None:
            own = self.own(logits, rows, columns)
            kept = None if own is None else own.clone()
            logits.masked_fill_(self.pairs.ids[rows, None] == self.pairs.all_ids[columns], -torch.inf)
            if own is not None and kept is not None:
                own.copy_(kept)
        return logits

    def product(self, rows: slice, columns: slice) -> Tensor:
        """Return <x_i, y_j> of one tile [I, J] in the type of the sums."""
        x, y = self.image[rows], self.text[columns]
        return torch.mm(x, y.T, out_dtype=self.scale.dtype) if self._mixed else torch.mm(x, y.T)

    def add_image_gradient(self, sums: Tensor, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add gradient·Y of one tile to sums [B, D], in place."""
        self._add_product(sums[rows], gradient, self.text[columns])

    def add_text_gradient(self, sums: Tensor, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add gradientᵀ·X of one tile to sums [G, D], in place."""
        self._add_product(sums[columns], gradient.T, self.image[rows])

    def own_rows(self, rows: slice, columns: slice) -> slice:
        """Return the rows of one tile whose own caption is among its columns; empty if there is none."""
        start = max(rows.start, columns.start - self._first)
        return slice(start, max(start, min(rows.stop, columns.stop - self._first)))

    def own(self, tile: Tensor, rows: slice, columns: slice) -> Tensor | None:
        """Return a view of the entries of `tile` [I, J] whose image and caption belong together, or None."""
        found = self.own_rows(rows, columns)
        if found.start == found.stop:
            return None
        shift = self._first - columns.start
        return tile[
            found.start - rows.start : found.stop - rows.start, found.start + shift : found.stop + shift
        ].diagonal()

    def buffer(self, which: int, shape: torch.Size) -> Tensor:
        """Return reused memory for one tile."""
        if self._buffers is None:
            return self.scale.new_empty(shape)
        return self._buffers[which, : shape.numel()].view(shape)

    def _addends(self, rows: slice, columns: slice) -> list[Tensor]:
        """What is added to the scaled products: the bias, and -inf for padding."""
        addends = []
        if self._row_bias is not None and self._column_bias is not None:
            addends = [self._row_bias[rows, None], self._column_bias[columns]]
        return addends if self._bias is None else [*addends, self._bias]

    def _product_in_buffer(self, rows: slice, columns: slice) -> Tensor:
        if self._scaled is None or self._scaled[0] != rows.start:
            self._scaled = rows.start, self.image[rows].to(self.scale.dtype) * self.scale
        x, y = self._scaled[1], self.text[columns].to(self.scale.dtype)
        out = self.buffer(0, torch.Size((len(x), len(y))))
        addends = self._addends(rows, columns)
        if not addends:
            return torch.mm(x, y.T, out=out)
        if len(addends) == 1:
            out.copy_(addends[0].expand_as(out))
        else:
            torch.add(addends[0], addends[1], out=out)
        for addend in addends[2:]:
            out.add_(addend)
        return torch.addmm(out, x, y.T, out=out)

    def _add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        if self._mixed:
            sums.add_(torch.mm(a.to(b.dtype), b, out_dtype=sums.dtype))
        else:
            torch.addmm(sums, a, b.to(sums.dtype), out=sums)
