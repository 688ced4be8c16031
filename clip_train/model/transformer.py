"""The pre-norm transformer that both towers share.

Both towers read one position of the last block (the class token, the end token), so the last block computes only that
position's query, MLP and residual, and keys and values of all: features and gradients are the same, the block's cost
falls to a sixth.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_train.model.packed import Packing


class BlockStyle(NamedTuple):
    """What sets the blocks of one stack apart from those of another, besides their size."""

    mlp_ratio: float = 4.0  # hidden over residual channels, rounded down
    quick_gelu: bool = False
    gelu_tanh: bool = False
    norm_eps: float = 1e-5
    layer_scale: float | None = None


class QuickGELU(nn.Module):
    """Approximate GELU by x * sigmoid(1.702 x), as OpenAI trained CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """Multiply each channel by a learned gain (CaiT, Touvron et al. 2021)."""

    def __init__(self, width: int, *, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with one fused input projection; the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.in_proj: nn.Linear | None = None  # in place of the two parameters, after split_projection
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def split_projection(self) -> None:
        """Make the input projection a layer of its own, as adapters can only change layers."""
        outputs, width = self.in_proj_weight.shape
        self.in_proj = nn.Linear(width, outputs, device="meta")
        self.in_proj.weight, self.in_proj.bias = self.in_proj_weight, self.in_proj_bias
        del self.in_proj_weight, self.in_proj_bias

    def forward(self, x: Tensor, *, causal: bool, packing: Packing | None = None) -> Tensor:
        """Attend from every position: [n, T, width] to [n, T, width], or [row, width] of packed captions."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias) if self.in_proj is None else self.in_proj(x)
        if packing is not None:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # [row, heads, w]
            return self.out_proj(packing.attention(q, k, v).flatten(1))
        n, length, width = x.shape
        q, k, v = qkv.view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # [n, heads, T, w]
        out = _attend(q, k, v, causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(n, length, width))

    def from_one(self, query: Tensor, x: Tensor, *, mask: Tensor | None, packing: Packing | None = None) -> Tensor:
        """Attend from one position per caption or image.

        query: [n, width]; x: [n, T, width], mask bool [n, T] of what it sees; or x [row, width] of packed captions.
        """
        width = x.shape[-1]
        if self.in_proj is None:
            q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
            kv = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        else:
            q, kv = self.in_proj(query)[:, :width], self.in_proj(x)[..., width:]
        if packing is not None:
            k, v = kv.unflatten(1, (2, self.heads, -1)).unbind(1)  # [row, heads, w]
            return self.out_proj(packing.attention_of_ends(q.unflatten(1, (self.heads, -1)), k, v).flatten(1))
        n, length, _ = x.shape
        q = q.view(n, 1, self.heads, width // self.heads).transpose(1, 2)  # [n, heads, 1, w]
        k, v = kv.view(n, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = _attend(q, k, v, mask=None if mask is None else mask[:, None, None])
        return self.out_proj(out.reshape(n, width))


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if q.device.type != "cpu" or q.dtype in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # A CPU's backward kernel for short types takes twice as long as converting and the one for float32.
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
    return out.to(q.dtype)


class MLP(nn.Module):
    """Two linear layers around an activation, position by position."""

    def __init__(self, width: int, *, hidden: int, style: BlockStyle) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU() if style.quick_gelu else nn.GELU("tanh" if style.gelu_tanh else "none")
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, *, heads: int, style: BlockStyle) -> None:
        super().__init__()
        scale = style.layer_scale
        self.ln_1 = nn.LayerNorm(width, eps=style.norm_eps)
        self.attn = Attention(width, heads=heads)
        self.ls_1 = nn.Identity() if scale is None else LayerScale(width, init=scale)
        self.ln_2 = nn.LayerNorm(width, eps=style.norm_eps)
        self.mlp = MLP(width, hidden=int(width * style.mlp_ratio), style=style)
        self.ls_2 = nn.Identity() if scale is None else LayerScale(width, init=scale)

    def forward(self, x: Tensor, causal: bool = False, packing: Packing | None = None) -> Tensor:
        """Return all positions: [n, T, width] to [n, T, width], or [row, width] of packed captions."""
        x = x + self.ls_1(self.attn(self.ln_1(x), causal=causal, packing=packing))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class ReadingBlock(ResidualAttentionBlock):
    """The last block of a stack, computed at the one position per row that is read."""

    def forward(  # type: ignore[override]
        self, x: Tensor, causal: bool = False, positions: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Return [n, width]: the state at `positions` [n], or at the first, each seeing all or what precedes it.

        Of packed captions [row, width], the last position of each span.
        """
        normed = self.ln_1(x)
        mask = None
        if packing is not None:
            residual, query = x[packing.ends], normed[packing.ends]
        elif positions is None:
            residual, query = x[:, 0], normed[:, 0]
        else:
            rows = torch.arange(x.shape[0], device=x.device)  # len() would fix the batch of an exported graph
            residual, query = x[rows, positions], normed[rows, positions]
            mask = torch.arange(x.shape[1], device=x.device) <= positions[:, None] if causal else None
        residual = residual + self.ls_1(self.attn.from_one(query, normed, mask=mask, packing=packing))
        return residual + self.ls_2(self.mlp(self.ln_2(residual)))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        checkpointing: recompute every k-th block in the backward pass, 0 for none.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        heads: int,
        style: BlockStyle,
        checkpointing: int = 0,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.head_width = width // heads
        kinds = [ResidualAttentionBlock] * (layers - 1) + [ReadingBlock]
        self.resblocks = nn.ModuleList(kind(width, heads=heads, style=style) for kind in kinds)

    def forward(
        self, x: Tensor, *, causal: bool = False, positions: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Run all blocks and read one position per row: [n, T, width] to [n, width].

        Args:
            causal: each position sees only itself and what precedes it.
            positions: int64 [n], what to read; None reads the first.
            packing: of captions in one row, x [row, width], read at the last token of each span.
        """
        recompute = self.checkpointing if self.training and torch.is_grad_enabled() else 0
        *blocks, last = self.blocks()
        for i, block in enumerate(blocks):
            if recompute and i % recompute == 0:
                x = checkpoint(block, x, causal, packing, use_reentrant=False)
            else:
                x = block(x, causal, packing)
        return last(x, causal, positions, packing)

    def blocks(self) -> list[ResidualAttentionBlock]:
        """Return the blocks, first to last."""
        return cast("list[ResidualAttentionBlock]", list(self.resblocks))

    def init_as_text_tower(self) -> None:
        """Draw the block weights as OpenAI CLIP does for text (`CLIP.initialize_parameters`).

        Residual projections shrink with depth, std = width^-0.5 (2 layers)^-0.5. The image tower keeps the layers' own
        defaults.
        """
        for block in self.blocks():
            width = block.attn.out_proj.in_features
            projection_std = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=projection_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=projection_std)
