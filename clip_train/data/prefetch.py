"""Bring batches to the device while it computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clip_train.types import Batch


def batches_on(device: torch.device, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield `batches` on `device`.

    On CUDA a batch is copied on a stream of its own: the trainer asks for it when the step before is under way, and the
    copy runs behind that step. On the CPU batches pass as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in moved:
            if tensor.is_cuda:
                tensor.record_stream(compute)  # its memory is not reused before the step has read it
        yield moved
