"""The same tiles on CUDA: the products are ordinary GEMMs, what follows each is one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clip_train.loss.tiles import LineSums, LogitTiles, SigmoidSums

if TYPE_CHECKING:
    from clip_train.loss.kernels import Mask


def logit_tiles(image: Tensor, text: Tensor, **options: Any) -> LogitTiles:
    """Return the tiles that suit the device; takes what `LogitTiles` takes."""
    kind = FusedLogitTiles if image.is_cuda else LogitTiles
    return kind(image, text, **options)


class FusedLogitTiles(LogitTiles):
    """Tiles whose scaling, masks, exponentials and sums are fused: each product is read once.

    What torch.compile makes of the same sums reads it four times: it reduces one dimension at a time, and a line's
    maximum before its total.
    """

    def __init__(self, image: Tensor, text: Tensor, **options: Any) -> None:
        """Take what `LogitTiles` takes."""
        super().__init__(image, text, **options)
        valid = self.pairs.valid
        self._mixed = text.dtype != self.scale.dtype  # short types are multiplied straight into float32
        self._counted = self.scale.new_full((len(image),), 2.0) if valid is None else 2.0 * valid.to(self.scale.dtype)

    def add_sums(self, sums: tuple[LineSums, LineSums], own: Tensor, rows: slice, columns: slice) -> None:
        """Add the sums of exp along the rows and along the columns of one tile, in place."""
        from clip_train.loss.kernels import add_line_sums

        add_line_sums(
            self._product(rows, columns), self._mask(rows, columns), rows=sums[0].of_lines(rows),
            columns=sums[1].of_lines(columns), own=own[rows],
        )  # fmt: skip

    def gradient(self, rows: slice, columns: slice, row_log_sum: Tensor, column_log_sum: Tensor) -> Tensor:
        """Return exp(S - R) + exp(S - C) - 2δ of one tile, in the type of the products."""
        from clip_train.loss.kernels import gradient

        return gradient(
            self._product(rows, columns), self._mask(rows, columns), row_log_sum=row_log_sum[rows],
            column_log_sum=column_log_sum[columns], counted=self._counted[rows], dtype=self.text.dtype,
        )  # fmt: skip

    def sigmoid(self, own: Tensor, rows: slice, columns: slice, *, differentiate: bool) -> SigmoidSums:
        """Return what the sigmoid loss needs of one tile, its gradient in the type of the products."""
        from clip_train.loss.kernels import sigmoid

        dtype = self.text.dtype if differentiate else None
        return sigmoid(self._product(rows, columns), self._mask(rows, columns), own=own[rows], dtype=dtype)

    def _product(self, rows: slice, columns: slice) -> Tensor:
        """Return <x_i, y_j> of one tile [I, J] in the type of the sums."""
        x, y = self.image_rows(rows), self.text[columns]
        return torch.mm(x, y.T, out_dtype=self.scale.dtype) if self._mixed else torch.mm(x, y.T)

    def _add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        if self._mixed:
            sums.add_(torch.mm(a, b, out_dtype=sums.dtype))
        else:
            super()._add_product(sums, a, b)

    def _mask(self, rows: slice, columns: slice) -> Mask:
        from clip_train.loss.kernels import Mask

        def part(values: Tensor | None, lines: slice) -> Tensor | None:
            return None if values is None else values[lines]

        return Mask(
            scale=self.scale, bias=self._bias, first_row=self._first + rows.start, first_column=columns.start,
            row_bias=part(self._row_bias, rows), column_bias=part(self._column_bias, columns),
            row_ids=part(self.pairs.ids, rows), column_ids=part(self.pairs.all_ids, columns),
        )  # fmt: skip
