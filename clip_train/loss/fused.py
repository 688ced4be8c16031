"""The same tiles on CUDA, with everything around the matrix products compiled into a few kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_train.loss.tiles import LineSums, LogitTiles, TileSums, finite


class Mask(NamedTuple):
    """What turns the products of a tile into logits."""

    scale: Tensor  # []
    row_slots: Tensor  # [I] int64, column of each row's own caption
    column_slots: Tensor  # [J] int64
    row_bias: Tensor | None  # [I], -inf for padding
    column_bias: Tensor | None  # [J]
    row_ids: Tensor | None  # [I] int64, equal captions have equal ids
    column_ids: Tensor | None  # [J]


def tile_sums(product: Tensor, mask: Mask) -> tuple[LineSums, LineSums]:
    """Return the sums along rows and columns of one tile of products [I, J]."""
    logits = _logits(product, mask)
    rows, columns = logits.amax(1), logits.amax(0)
    row_total = (logits - finite(rows)[:, None]).exp().sum(1)
    column_total = (logits - finite(columns)).exp().sum(0)
    return LineSums(rows, row_total), LineSums(columns, column_total)


def tile_gradient(
    product: Tensor, mask: Mask, *, row_log_sum: Tensor, column_log_sum: Tensor, counted: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return exp(S - R) + exp(S - C) - 2δ of one tile [I, J], cast to `dtype` last.

    row_log_sum: [I]; column_log_sum: [J]; counted: [I], 2 for pairs that count and 0 for padding.
    """
    logits = _logits(product, mask)
    own = mask.row_slots[:, None] == mask.column_slots
    gradient = (logits - row_log_sum[:, None]).exp() + (logits - column_log_sum).exp()
    return (gradient - torch.where(own, counted[:, None], 0.0)).to(dtype)


def _logits(product: Tensor, mask: Mask) -> Tensor:
    logits = product * mask.scale
    if mask.row_bias is not None and mask.column_bias is not None:
        logits = logits + mask.row_bias[:, None] + mask.column_bias
    if mask.row_ids is not None and mask.column_ids is not None:
        repeated = (mask.row_ids[:, None] == mask.column_ids) & (mask.row_slots[:, None] != mask.column_slots)
        logits = logits.masked_fill(repeated, -torch.inf)
    return logits


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=True)


class FusedLogitTiles(LogitTiles):
    """Tiles whose scaling, masks, exponentials and sums are compiled; the products stay ordinary GEMMs."""

    def __init__(self, image: Tensor, text: Tensor, **options: Any) -> None:
        """Take what `LogitTiles` takes."""
        super().__init__(image, text, **options)
        self._row_slots = torch.arange(self._first, self._first + len(image), device=image.device)
        self._column_slots = torch.arange(len(text), device=text.device)
        valid = self.pairs.valid
        self._counted = self.scale.new_full((len(image),), 2.0) if valid is None else 2.0 * valid.to(self.scale.dtype)

    def sums(self, rows: slice, columns: slice) -> TileSums:
        """Return the sums of exp along the rows and along the columns of one tile."""
        product = self.product(rows, columns)
        along_rows, along_columns = _compiled(tile_sums)(product, self._mask(rows, columns))
        own = self.own(product, rows, columns)
        return TileSums(along_rows, along_columns, None if own is None else own * self.scale)

    def gradient(self, rows: slice, columns: slice, row_log_sum: Tensor, column_log_sum: Tensor) -> Tensor:
        """Return exp(S - R) + exp(S - C) - 2δ of one tile, in the type of the products."""
        return _compiled(tile_gradient)(
            self.product(rows, columns),
            self._mask(rows, columns),
            row_log_sum=row_log_sum[rows],
            column_log_sum=column_log_sum[columns],
            counted=self._counted[rows],
            dtype=self.text.dtype,
        )

    def _mask(self, rows: slice, columns: slice) -> Mask:
        def part(values: Tensor | None, lines: slice) -> Tensor | None:
            return None if values is None else values[lines]

        return Mask(
            self.scale,
            self._row_slots[rows],
            self._column_slots[columns],
            part(self._row_bias, rows),
            part(self._column_bias, columns),
            part(self.pairs.ids, rows),
            part(self.pairs.all_ids, columns),
        )
