"""Identify captions, so that two equal captions in one batch need not count as a mismatch."""

from __future__ import annotations

import torch
from torch import Tensor

# Finaliser of splitmix64 (Steele et al. 2014), as signed 64-bit numbers.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def caption_ids(tokens: Tensor) -> Tensor:
    """Return a 64-bit id per caption, equal for equal captions, on the device of the tokens.

    tokens: [B, L] integers, zero-padded after the end token. Returns [B] int64. The id does not depend on L. It is a
    sum of products with fixed odd factors, one per position: two given captions collide with a chance near 2^-64.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)  # [L] int64
    factors = _mix((position + 1) * _GOLDEN) | 1  # [L], built on the device: a copy from the host would wait for it
    return (tokens.long() * factors).sum(1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> repeats the sign bit; the mask removes it
