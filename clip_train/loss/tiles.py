"""The matrix of logits, tile by tile: its size never matters to memory.

Rows are this rank's images [B], columns the captions of all ranks [G]. A tile is named by two slices. This is how a CPU
does it; `fused.py` has what CUDA does otherwise. Two buffers of one tile's size are reused throughout, because on a CPU
fresh memory costs as much time as the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clip_train.loss.exchange import Pairs

# On CUDA a tile of products and its gradient in bf16 take 75 MB: large enough for GEMMs, little beside features [G, D].
TILE = {"cpu": (1024, 2048), "cuda": (2048, 6144)}


class LineSums(NamedTuple):
    """Σ exp(logit) of every line, as maximum and total: log-sum = maximum + log(total), safe at any scale."""

    maximum: Tensor  # [lines], -inf for a line without logits
    total: Tensor  # [lines], Σ exp(logit - maximum)

    @classmethod
    def of_nothing(cls, lines: int, *, like: Tensor) -> LineSums:
        """Return the sums of `lines` empty lines."""
        return cls(like.new_full((lines,), -torch.inf), like.new_zeros(lines))

    def of_lines(self, lines: slice) -> LineSums:
        """Return a view of these lines."""
        return LineSums(self.maximum[lines], self.total[lines])

    def add(self, other: LineSums) -> None:
        """Add `other` to all lines, in place."""
        maximum, total = self
        merged = torch.maximum(maximum, other.maximum)
        base = finite(merged)
        total.mul_((maximum - base).exp_()).add_(other.total * (other.maximum - base).exp_())
        maximum.copy_(merged)

    def log(self) -> Tensor:
        """Return log Σ exp [lines], -inf for a line without logits."""
        return self.maximum + self.total.log()


class SigmoidSums(NamedTuple):
    """What the sigmoid loss keeps of a tile [I, J]."""

    loss: Tensor  # [], Σ log(1 + exp(±U))
    gradient_sum: Tensor  # []
    row_maximum: Tensor  # [I], largest logit
    gradient: Tensor | None  # [I, J], of the loss by the logits, where asked for


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

        image: [B, D]; text: [G, D] in the type of the products; scale and bias: [] in the type of the sums;
        first: the column of this rank's first pair.
        """
        self.image, self.text, self.scale, self.pairs = image, text, scale, pairs
        self._first, self._bias = first, bias
        most_rows, most_columns = tile or TILE[image.device.type]
        self._block = min(most_rows, len(image)), min(most_columns, len(text))
        self._buffers: Tensor | None = None
        self._row_bias = self._column_bias = None
        if pairs.valid is not None and pairs.all_valid is not None:
            self._row_bias, self._column_bias = (
                scale.new_zeros(valid.shape).masked_fill_(~valid, -torch.inf)
                for valid in (pairs.valid, pairs.all_valid)
            )
        self._cast: tuple[int, Tensor] | None = None  # of the row block at work, image features as they are multiplied
        self._scaled: tuple[int, Tensor] | None = None  # and scaled

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the tiles row by row, as (rows, columns)."""
        for i in range(0, len(self.image), self._block[0]):
            for j in range(0, len(self.text), self._block[1]):
                yield (
                    slice(i, min(i + self._block[0], len(self.image))),
                    slice(j, min(j + self._block[1], len(self.text))),
                )

    def add_sums(self, sums: tuple[LineSums, LineSums], own: Tensor, rows: slice, columns: slice) -> None:
        """Add the sums of exp along the rows and along the columns of one tile, in place.

        sums: of all rows and of all columns; own: [B], gets the logits of pairs that belong together.
        """
        logits = self.logits(rows, columns)
        scratch = self.buffer(1, logits.shape)
        self.copy_own(logits, own, rows, columns)
        for line_sums, lines, axis in zip(sums, (rows, columns), (1, 0), strict=True):
            maximum = logits.amax(axis)
            base = finite(maximum).unsqueeze(axis)
            total = torch.sub(logits, base, out=scratch).exp_().sum(axis)
            line_sums.of_lines(lines).add(LineSums(maximum, total))

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

    def sigmoid(self, own: Tensor, rows: slice, columns: slice, *, differentiate: bool) -> SigmoidSums:
        """Return what the sigmoid loss needs of one tile.

        own: [B], gets the logits of pairs that belong together.
        """
        logits = self.logits(rows, columns)
        row_maximum = logits.amax(1)
        self.copy_own(logits, own, rows, columns)
        pairs = self.own(logits, rows, columns)
        if pairs is not None:
            valid = self.pairs.valid
            flipped = -pairs
            if valid is not None:
                flipped.masked_fill_(~valid[self.own_rows(rows, columns)], -torch.inf)
            pairs.copy_(flipped)  # -log σ(U) is log(1 + exp(-U)): as accurate as all the others
        zero = logits.new_zeros(())
        loss = torch.logaddexp(logits, zero, out=self.buffer(1, logits.shape)).sum()
        if not differentiate:
            return SigmoidSums(loss, zero, row_maximum, None)
        gradient = logits.sigmoid_()
        if pairs is not None:
            pairs.neg_()
        return SigmoidSums(loss, gradient.sum(), row_maximum, gradient)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits of one tile [I, J] in the type of the sums. The next call overwrites them."""
        logits = self._product_in_buffer(rows, columns)
        if self.pairs.ids is not None and self.pairs.all_ids is not None:
            own = self.own(logits, rows, columns)
            kept = None if own is None else own.clone()
            logits.masked_fill_(self.pairs.ids[rows, None] == self.pairs.all_ids[columns], -torch.inf)
            if own is not None and kept is not None:
                own.copy_(kept)
        return logits

    def add_products(
        self, gradient: Tensor, of_image: Tensor | None, of_text: Tensor | None, rows: slice, columns: slice
    ) -> None:
        """Add gradient·Y of one tile to of_image [B, D] and gradientᵀ·X to of_text [G, D], in place, where given."""
        if of_image is not None:
            self._add_product(of_image[rows], gradient, self.text[columns])
        if of_text is not None:
            self._add_product(of_text[columns], gradient.T, self.image_rows(rows))

    def image_rows(self, rows: slice) -> Tensor:
        """Return image features [I, D] in the type of the products. All of them at once would be memory for nothing."""
        if self._cast is None or self._cast[0] != rows.start:
            self._cast = rows.start, self.image[rows].to(self.text.dtype)
        return self._cast[1]

    def dot_image(self, of_image: Tensor) -> Tensor:
        """Return Σ <row of of_image [B, D], image features> []."""
        return self._dot(of_image, self.image, rows=self._block[0])

    def dot_text(self, of_text: Tensor) -> Tensor:
        """Return Σ <row of of_text [G, D], text features> []."""
        return self._dot(of_text, self.text, rows=self._block[1])

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

    def copy_own(self, logits: Tensor, own: Tensor, rows: slice, columns: slice) -> None:
        """Copy the logits of pairs that belong together from one tile into own [B]."""
        found = self.own(logits, rows, columns)
        if found is not None:
            own[self.own_rows(rows, columns)] = found

    def buffer(self, which: int, shape: torch.Size) -> Tensor:
        """Return reused memory for one tile, `which` is 0 or 1."""
        if self._buffers is None:
            self._buffers = self.scale.new_empty(2, self._block[0] * self._block[1])
        return self._buffers[which, : shape.numel()].view(shape)

    def _dot(self, gradient: Tensor, features: Tensor, *, rows: int) -> Tensor:
        """Return the dot product of two matrices, so many rows at a time: another matrix like them would be memory."""
        blocks = zip(gradient.split(rows), features.split(rows), strict=True)
        return torch.cat([(a * b.to(self.text.dtype)).sum(1) for a, b in blocks]).sum()

    def _addends(self, rows: slice, columns: slice) -> list[Tensor]:
        """What is added to the scaled products: the bias, and -inf for padding."""
        addends = []
        if self._row_bias is not None and self._column_bias is not None:
            addends = [self._row_bias[rows, None], self._column_bias[columns]]
        return addends if self._bias is None else [*addends, self._bias]

    def _product_in_buffer(self, rows: slice, columns: slice) -> Tensor:
        if self._scaled is None or self._scaled[0] != rows.start:
            self._scaled = rows.start, self.image_rows(rows).to(self.scale.dtype) * self.scale
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
        torch.addmm(sums, a, b.to(sums.dtype), out=sums)
