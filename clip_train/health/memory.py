"""Say what would fit when a device runs out of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

_STATE_BYTES = 16  # of a trained float32 parameter: weight, gradient and Adam's two averages
_USABLE = 0.93  # of the memory; the rest goes to fragments and other libraries


def fitting_micro_batch(rows: int, *, micro_batch_size: int, fixed: int, peak: int, capacity: int) -> int | None:
    """Return the largest divisor of `rows` that should fit, None if none does.

    rows: of a rank. micro_batch_size: what did not fit. fixed: bytes that do not depend on it. peak: bytes that were
    taken and asked for when it failed, of which an unknown part of the step's activations was still to come: they are
    taken to be twice what was there. capacity: bytes of the device; 0 if unknown, then half the size is proposed.
    """
    smaller = [n for n in range(1, micro_batch_size) if rows % n == 0]
    if capacity:
        per_row = 2 * max(peak - fixed, 0) / micro_batch_size
        smaller = [n for n in smaller if fixed + n * per_row <= _USABLE * capacity]
    return max((n for n in smaller if 2 * n <= micro_batch_size), default=max(smaller, default=None))


def explain_out_of_memory(
    error: torch.OutOfMemoryError, *, model: nn.Module, device: torch.device, rows: int, micro_batch_size: int | None,
    step: int,
) -> str:  # fmt: skip
    """Return a message with the peak, the batch and the micro-batch that would fit."""
    size = micro_batch_size or rows
    fixed = _STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = capacity = 0
    taken = ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        capacity = torch.cuda.get_device_properties(device).total_memory
        taken = f" at a peak of {peak / 2**30:.1f} of {capacity / 2**30:.1f} GiB"
    fits = fitting_micro_batch(rows, micro_batch_size=size, fixed=fixed, peak=peak, capacity=capacity)
    advice = (
        f"micro_batch_size={fits} should fit, with the same gradients; micro_batch_size=auto finds the largest"
        if fits
        else "not even one pair at a time fits: try distributed=fsdp on several devices, or model.checkpointing=1"
    )
    what = str(error).partition("\n")[0]
    return (
        f"{device} ran out of memory in step {step + 1}{taken}, with {rows:,} pairs of this rank in micro-batches of "
        f"{size:,}: {advice}. ({what})"
    )
