"""Captions end to end in one row of tokens, with attention that stays inside each caption: no padding is computed.

torch's kernel for this (`torch.nn.attention.varlen`) exists on CUDA, in bfloat16 and float16, and its arguments changed
between versions. It is found by trying it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

ROW_TOKENS = 1024
"""A row is filled up to a multiple of this, so that few different shapes occur."""


class VarlenAttention(Protocol):
    """Attention within consecutive spans of tokens."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int,
        causal: bool,
    ) -> Tensor: ...  # fmt: skip


class Packing(NamedTuple):
    """Where captions lie in a row of tokens. Spans are the captions, then a fixed number of dummies that fill the row.

    No span is empty or longer than the context, whatever the captions: kernels see neither case.
    """

    tokens: Tensor  # [row] int64, index into the flattened captions; 0 in dummies
    positions: Tensor  # [row] int64, place within the span
    offsets: Tensor  # [spans + 1] int32, first token of each span
    ends: Tensor  # [spans] int64, last token of each span
    counter: Tensor  # [spans + 1] int32: 0, 1, 2 …, the offsets of one query per span
    context_length: int
    attend: VarlenAttention

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally from every token: each [row, heads, width of a head]."""
        return self.attend(
            q, k, v, q_offsets=self.offsets, k_offsets=self.offsets, max_q=self.context_length,
            max_k=self.context_length, causal=True,
        )  # fmt: skip

    def attention_of_ends(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the last token of each span, q [spans, heads, w], which sees all of its span."""
        return self.attend(
            q, k, v, q_offsets=self.counter, k_offsets=self.offsets, max_q=1, max_k=self.context_length, causal=False
        )


def pack(
    lengths: Sequence[int], *, width: int, context_length: int, device: torch.device, attend: VarlenAttention
) -> Packing:
    """Lay captions of these lengths, rows of a matrix of `width` tokens, end to end. Never waits for the device."""
    captions = torch.tensor(lengths).clamp(min=1)
    num_dummies = -(-(ROW_TOKENS - 1) // (context_length - 1))
    row = -(-(int(captions.sum()) + num_dummies) // ROW_TOKENS) * ROW_TOKENS
    rest = row - int(captions.sum())  # between num_dummies and num_dummies + ROW_TOKENS - 1
    dummies = torch.full((num_dummies,), rest // num_dummies)
    dummies[: rest % num_dummies] += 1
    spans = torch.cat([captions, dummies])
    offsets = torch.cat([spans.new_zeros(1), spans.cumsum(0)])
    span = torch.arange(len(spans)).repeat_interleave(spans)  # [row]
    positions = torch.arange(row) - offsets[span]
    tokens = torch.where(span < len(captions), span * width + positions, 0)
    per_token = to_device(torch.stack([tokens, positions]), device)
    per_span = to_device(torch.stack([offsets, torch.arange(len(offsets))]), device)
    return Packing(
        tokens=per_token[0],
        positions=per_token[1],
        offsets=per_span[0].int(),
        ends=per_span[0, 1:] - 1,
        counter=per_span[1].int(),
        context_length=context_length,
        attend=attend,
    )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy small host `values` to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Probe(NamedTuple):
    """What trying the kernel found."""

    attend: VarlenAttention | None
    reason: str  # why there is none


@functools.cache
def probe(device: torch.device, dtype: torch.dtype, *, head_width: int) -> Probe:
    """Try torch's kernel for packed captions once, forward and backward, on `device` in `dtype`."""
    if device.type != "cuda":
        return Probe(None, f"packed captions need CUDA, not {device.type}")
    if dtype not in (torch.bfloat16, torch.float16):
        return Probe(None, "packed captions need precision=bf16 or fp16")
    try:
        from torch.nn.attention.varlen import varlen_attn

        attend = adapt(varlen_attn)
        offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            q = torch.randn(5, 1, head_width, dtype=dtype, device=device, requires_grad=True)
            out = attend(q, q, q, q_offsets=offsets, k_offsets=offsets, max_q=3, max_k=3, causal=True)
            (gradient,) = torch.autograd.grad(out.float().sum(), q)
        if not (out.isfinite().all() and gradient.isfinite().all()):
            return Probe(None, "torch's attention over packed captions gave values that are not finite")
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        return Probe(None, f"torch {torch.__version__} offers no attention over packed captions here ({error})")
    return Probe(attend, "")


def adapt(varlen_attn: Callable[..., Any]) -> VarlenAttention:
    """Give torch's function one signature over its versions.

    Raises:
        TypeError: it has neither a window nor a flag for causal attention.
    """
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "is_causal"} & known.keys():
        raise TypeError("varlen_attn takes neither window_size nor is_causal")
    has_window = "window_size" in known

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int, causal: bool
    ) -> Tensor:
        mask: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if has_window else {"is_causal": causal}
        out: Tensor = varlen_attn(
            query=q, key=k, value=v, cu_seq_q=q_offsets, cu_seq_k=k_offsets, max_q=max_q, max_k=max_k, **mask
        )
        return out

    return attend
