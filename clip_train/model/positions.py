"""Position tables of weights that were trained at another image size or context length.

Meant for weights that start something new: a resumed run keeps its sizes, so that nothing there is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

# A vision transformer's, an attention pool's, and a timm trunk's, which has one more dimension in front.
IMAGE_TABLES = ("visual.positional_embedding", "visual.attnpool.positional_embedding", "visual.trunk.pos_embed")
TEXT_TABLE = "positional_embedding"


def resize_positions(tensors: dict[str, Tensor], *, expected: Mapping[str, torch.Size]) -> list[str]:
    """Interpolate the position tables among `tensors` to the sizes that a model expects, replacing them in place.

    Left alone are tables that already fit, and those that no interpolation makes fit (another width, no square grid):
    whoever assigns the weights refuses them by shape.

    Args:
        tensors: weights under native names.
        expected: shapes by name, of `model.state_dict()`; the model may be on the meta device.

    Returns:
        One line for the log per table that was resized.
    """
    lines = []
    for name in (*IMAGE_TABLES, TEXT_TABLE):
        if name not in tensors or name not in expected:
            continue
        before, after = tensors[name].shape, expected[name]
        if before == after or len(before) != len(after) or before[-1] != after[-1]:
            continue
        if name == TEXT_TABLE:
            tensors[name] = resize_text_positions(tensors[name], length=after[0])
            lines.append(f"{name}: {before[0]} -> {after[0]} tokens, linear")
        elif (num_prefix := _num_prefix_rows(before[-2], after[-2])) is not None:
            tensors[name] = resize_image_positions(tensors[name], num_rows=after[-2], num_prefix=num_prefix)
            old, new = isqrt(before[-2] - num_prefix), isqrt(after[-2] - num_prefix)
            lines.append(f"{name}: {old}x{old} -> {new}x{new} positions, bicubic")
    return lines


def resize_image_positions(table: Tensor, *, num_rows: int, num_prefix: int = 1) -> Tensor:
    """Interpolate the positions of a square grid: [.., p + n², width] to [.., p + m², width].

    Bicubic with antialiasing, in float32, as open_clip does for vision transformers. The type stays.

    Args:
        num_rows: p + m².
        num_prefix: p, rows in front that belong to no patch (class token, mean of the grid); kept as they are.
    """
    prefix, grid = table[..., :num_prefix, :], table[..., num_prefix:, :]
    before, after = isqrt(grid.shape[-2]), isqrt(num_rows - num_prefix)
    pixels = grid.float().reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, width, n, n]
    resized = F.interpolate(pixels, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(*grid.shape[:-2], after * after, -1)
    return torch.cat([prefix, rows.to(table.dtype)], dim=-2)


def resize_text_positions(table: Tensor, *, length: int) -> Tensor:
    """Interpolate the positions of a text tower linearly, in float32: [n, width] to [length, width]."""
    resized = F.interpolate(table.float().T[None], size=length, mode="linear", align_corners=False)
    return resized[0].T.to(table.dtype).contiguous()


def _num_prefix_rows(before: int, after: int) -> int | None:
    """Return how many rows both tables have before a square grid, at most 5 (a class token, four registers)."""
    for count in range(6):
        if all(rows > count and isqrt(rows - count) ** 2 == rows - count for rows in (before, after)):
            return count
    return None
