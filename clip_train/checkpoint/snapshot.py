"""A checkpoint in CPU memory, between training and the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clip_train.checkpoint.files import safetensors_chunks
from clip_train.checkpoint.load import TRAIN_STATE_NAME
from clip_train.errors import ClipTrainError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one checkpoint will hold."""

    step: int
    consumed: int  # samples seen
    tensors: dict[str, dict[str, Tensor]]  # by part
    texts: dict[str, bytes]  # by file name

    @property
    def num_bytes(self) -> int:
        """Size of the checkpoint, headers and manifest left out."""
        tensors = sum(t.nbytes for part in self.tensors.values() for t in part.values())
        return tensors + sum(len(text) for text in self.texts.values())

    def contents(self) -> dict[str, Iterable[bytes | memoryview]]:
        """Return the pieces of each file by its name."""
        tensors = {f"{name}.safetensors": safetensors_chunks(part) for name, part in self.tensors.items()}
        return {**tensors, **{name: [text] for name, text in self.texts.items()}}

    def require_finite(self) -> None:
        """Refuse to keep what training can no longer be continued from.

        Raises:
            ClipTrainError: a tensor holds NaN or Inf; the message lists the first ten.
        """
        names = [
            f"{part}: {name}"
            for part, tensors in self.tensors.items()
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor)
        ]
        if names:
            more = f"; and {len(names) - 10} more" if len(names) > 10 else ""
            raise ClipTrainError(f"step {self.step} was not saved, NaN or Inf in {'; '.join(names[:10])}{more}")


def take_snapshot(
    tensors: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    *,
    step: int,
    consumed: int,
    files: Mapping[str, bytes],
) -> Snapshot:
    """Split the parts into tensors and text, which is made now: the parts go on changing. `files` join the texts."""
    texts = {**files, TRAIN_STATE_NAME: _to_json({"step": step, "consumed": consumed, **state})}
    by_part = {}
    for part, values in tensors.items():
        by_part[part] = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        if rest:
            texts[f"{part}.json"] = _to_json(rest)
    return Snapshot(step=step, consumed=consumed, tensors=by_part, texts=texts)


def _to_json(values: Mapping[str, Any]) -> bytes:
    # NaN is no JSON, and a state with NaN is no state to continue from.
    return json.dumps(values, indent=1, allow_nan=False).encode() + b"\n"


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # one pass without a temporary; both are NaN if any element is
    return bool(low.isfinite() and high.isfinite())
