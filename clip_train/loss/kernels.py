"""Triton kernels over one tile of products <x_i, y_j>: each reads the tile once.

Import this on CUDA only, or anywhere with TRITON_INTERPRET=1, which computes the same with numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clip_train.loss.tiles import LineSums, SigmoidSums

# A block that is only summed has 32 numbers per thread, so that few parts are left to merge; a written one has 16.
_SUMMED = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}
_WRITTEN = {"ROWS": 16, "COLUMNS": 256, "num_warps": 8}
_MERGED = {"LINES": 64, "PARTS": 64, "num_warps": 8}


class Mask(NamedTuple):
    """What turns the products of a tile into logits."""

    scale: Tensor  # []
    bias: Tensor | None  # []
    first_row: int  # column, among those of all ranks, of the first row's own caption
    first_column: int  # the tile's first column
    row_bias: Tensor | None  # [I], -inf for padding
    column_bias: Tensor | None  # [J]
    row_ids: Tensor | None  # [I] int64, equal captions have equal ids
    column_ids: Tensor | None  # [J]


@triton.jit
def _logits(
    products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return this program's block of logits, -inf outside the tile, and where a row meets its own caption."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < num_rows)[:, None] & (j < num_columns)[None, :]
    logits = tl.load(products + i[:, None] * num_columns + j[None, :], mask=inside, other=0.0) * tl.load(scale)
    own = inside & ((first_row + i)[:, None] == (first_column + j)[None, :])
    if bias is not None:
        logits += tl.load(bias)
    if row_bias is not None:
        logits += tl.load(row_bias + i, mask=i < num_rows, other=0.0)[:, None]
        logits += tl.load(column_bias + j, mask=j < num_columns, other=0.0)[None, :]
    if row_ids is not None:
        of_row = tl.load(row_ids + i, mask=i < num_rows, other=0)
        of_column = tl.load(column_ids + j, mask=j < num_columns, other=0)
        logits = tl.where((of_row[:, None] == of_column[None, :]) & (own == 0), float("-inf"), logits)
    return tl.where(inside, logits, float("-inf")), own, i, j, inside


@triton.jit
def _write_own(own_logits, logits, own, i, j, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the logits of rows with their own captions, if this block can hold one."""
    shift = first_row + tl.program_id(0) * ROWS - first_column - tl.program_id(1) * COLUMNS
    if (shift > -ROWS) & (shift < COLUMNS):
        tl.store(own_logits + i[:, None] + 0 * j[None, :], logits, mask=own)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def _sum_block(
    products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
    row_parts, column_parts, own_logits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write maximum and total of every line of this block: row_parts [2, blocks, I], column_parts [2, blocks, J]."""
    logits, own, i, j, _ = _logits(
        products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows,
        num_columns, ROWS, COLUMNS,
    )  # fmt: skip
    row_maximum, column_maximum = tl.max(logits, 1), tl.max(logits, 0)
    row_base = tl.where(row_maximum == float("-inf"), 0.0, row_maximum)
    column_base = tl.where(column_maximum == float("-inf"), 0.0, column_maximum)
    row_total = tl.sum(tl.exp(logits - row_base[:, None]), 1)
    column_total = tl.sum(tl.exp(logits - column_base[None, :]), 0)
    at_row, at_column = tl.program_id(1) * num_rows + i, tl.program_id(0) * num_columns + j
    tl.store(row_parts + at_row, row_maximum, mask=i < num_rows)
    tl.store(row_parts + tl.num_programs(1) * num_rows + at_row, row_total, mask=i < num_rows)
    tl.store(column_parts + at_column, column_maximum, mask=j < num_columns)
    tl.store(column_parts + tl.num_programs(0) * num_columns + at_column, column_total, mask=j < num_columns)
    _write_own(own_logits, logits, own, i, j, first_row, first_column, ROWS, COLUMNS)


@triton.jit
def _merge_parts(
    parts, maximum, total, num_lines, num_parts: tl.constexpr, LINES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Add the parts [2, parts, lines] of every line to its running maximum and total, in a fixed order."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    here = line < num_lines
    highest = tl.load(maximum + line, mask=here, other=0.0)
    summed = tl.load(total + line, mask=here, other=0.0)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & here[None, :]
        places = part[:, None] * num_lines + line[None, :]
        maxima = tl.load(parts + places, mask=inside, other=float("-inf"))
        totals = tl.load(parts + num_parts * num_lines + places, mask=inside, other=0.0)
        merged = tl.maximum(highest, tl.max(maxima, 0))
        base = tl.where(merged == float("-inf"), 0.0, merged)
        summed = summed * tl.exp(highest - base) + tl.sum(totals * tl.exp(maxima - base[None, :]), 0)
        highest = merged
    tl.store(maximum + line, highest, mask=here)
    tl.store(total + line, summed, mask=here)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def _gradient_block(
    products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
    row_log_sum, column_log_sum, counted, gradient,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write exp(S - R) + exp(S - C) - 2δ of this block."""
    logits, own, i, j, inside = _logits(
        products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows,
        num_columns, ROWS, COLUMNS,
    )  # fmt: skip
    of_row = tl.load(row_log_sum + i, mask=i < num_rows, other=0.0)[:, None]
    of_column = tl.load(column_log_sum + j, mask=j < num_columns, other=0.0)[None, :]
    of_own = tl.load(counted + i, mask=i < num_rows, other=0.0)[:, None]
    entries = tl.exp(logits - of_row) + tl.exp(logits - of_column) - tl.where(own, of_own, 0.0)
    tl.store(gradient + i[:, None] * num_columns + j[None, :], entries, mask=inside)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def _sigmoid_block(
    products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows, num_columns,
    sums, row_parts, own_logits, gradient,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write this block's sums of loss and gradient, sums [2, blocks], its rows' maxima [blocks, I], its gradient."""
    logits, own, i, j, inside = _logits(
        products, scale, bias, row_bias, column_bias, row_ids, column_ids, first_row, first_column, num_rows,
        num_columns, ROWS, COLUMNS,
    )  # fmt: skip
    tl.store(row_parts + tl.program_id(1) * num_rows + i, tl.max(logits, 1), mask=i < num_rows)
    _write_own(own_logits, logits, own, i, j, first_row, first_column, ROWS, COLUMNS)
    flipped = own & (logits > float("-inf"))
    u = tl.where(flipped, -logits, logits)
    small = tl.exp(-tl.abs(u))
    one_more = 1.0 + small
    # log(1 + e) to full precision for small e (Kahan): rounding 1 + e is made good by the division.
    rest = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    softplus = tl.maximum(u, 0.0) + tl.where(one_more == 1.0, small, tl.log(one_more) * (small / rest))
    slope = tl.where(u >= 0, 1.0, small) / one_more
    slope = tl.where(flipped, -slope, slope)
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + block, tl.sum(tl.sum(tl.where(inside, softplus, 0.0), 1), 0))
    tl.store(sums + tl.num_programs(0) * tl.num_programs(1) + block, tl.sum(tl.sum(slope, 1), 0))
    if gradient is not None:
        tl.store(gradient + i[:, None] * num_columns + j[None, :], slope, mask=inside)


def add_line_sums(product: Tensor, mask: Mask, *, rows: LineSums, columns: LineSums, own: Tensor) -> None:
    """Add Σ exp of one tile of products [I, J] to its rows' and columns' sums; write own logits into own [I]."""
    grid = _grid(product, _SUMMED)
    row_parts = product.new_empty(2, grid[1], product.shape[0])
    column_parts = product.new_empty(2, grid[0], product.shape[1])
    _sum_block[grid](*_arguments(product, mask), row_parts, column_parts, own, **_SUMMED)
    for parts, sums in ((row_parts, rows), (column_parts, columns)):
        _, count, lines = parts.shape
        _merge_parts[(triton.cdiv(lines, _MERGED["LINES"]),)](
            parts, *sums, lines, num_parts=count, **_MERGED
        )  # fmt: skip


def gradient(
    product: Tensor, mask: Mask, *, row_log_sum: Tensor, column_log_sum: Tensor, counted: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return exp(S - R) + exp(S - C) - 2δ of one tile [I, J], cast to `dtype` last.

    row_log_sum: [I]; column_log_sum: [J]; counted: [I], 2 for pairs that count and 0 for padding.
    """
    entries = torch.empty_like(product, dtype=dtype)
    arguments = _arguments(product, mask)
    _gradient_block[_grid(product, _WRITTEN)](*arguments, row_log_sum, column_log_sum, counted, entries, **_WRITTEN)
    return entries


def sigmoid(product: Tensor, mask: Mask, *, own: Tensor, dtype: torch.dtype | None) -> SigmoidSums:
    """Return loss and gradient of the sigmoid loss of one tile [I, J]; write own logits into own [I].

    dtype: of the gradient, cast last; None for no gradient.
    """
    grid = _grid(product, _WRITTEN)
    sums = product.new_empty(2, grid[0] * grid[1])
    row_parts = product.new_empty(grid[1], product.shape[0])
    entries = None if dtype is None else torch.empty_like(product, dtype=dtype)
    _sigmoid_block[grid](*_arguments(product, mask), sums, row_parts, own, entries, **_WRITTEN)
    loss, gradient_sum = sums.sum(1)
    return SigmoidSums(loss, gradient_sum, row_parts.amax(0), entries)


def _grid(product: Tensor, block: dict[str, int]) -> tuple[int, int]:
    assert product.is_contiguous() and product.numel() < 2**31, product.shape
    return triton.cdiv(product.shape[0], block["ROWS"]), triton.cdiv(product.shape[1], block["COLUMNS"])


def _arguments(product: Tensor, mask: Mask) -> tuple[Tensor | int | None, ...]:
    return (
        product, mask.scale, mask.bias, mask.row_bias, mask.column_bias, mask.row_ids, mask.column_ids,
        mask.first_row, mask.first_column, *product.shape,
    )  # fmt: skip
