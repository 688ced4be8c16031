"""A checkpoint in CPU memory, between training and the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clip_train.checkpoint.load import TRAIN_STATE_NAME
from clip_train.checkpoint.tensors import TensorFile, is_shared, own_files, part_of
from clip_train.errors import ClipTrainError, first_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from clip_train.distributed.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What this rank will write of one checkpoint."""

    step: int
    consumed: int  # samples seen
    files: dict[str, TensorFile]  # by name
    texts: dict[str, bytes]  # by file name; on rank 0
    is_shared: bool  # other ranks write files of it, too
    num_bytes: int  # of the checkpoint as all ranks write it, headers and manifest left out

    def contents(self) -> dict[str, Iterable[bytes | memoryview]]:
        """Return the pieces of each file by its name."""
        tensors = {name: file.chunks() for name, file in self.files.items()}
        return {**tensors, **{name: [text] for name, text in self.texts.items()}}

    def require_finite(self) -> None:
        """Refuse to keep what training can no longer be continued from.

        Raises:
            ClipTrainError: a tensor holds NaN or Inf; the message lists the first ten.
        """
        names = [
            f"{part_of(file)}: {name}"
            for file, content in self.files.items()
            for name, tensor in content.tensors.items()
            if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor)
        ]
        if names:
            raise ClipTrainError(f"step {self.step} was not saved, NaN or Inf in {first_of(names, between='; ')}")


def take_snapshot(
    parts: Mapping[str, Mapping[str, Any]], *, texts: Mapping[str, bytes], step: int, consumed: int, world: World
) -> Snapshot:
    """Copy to CPU memory what this rank is to write of the parts, which go on changing. Every rank calls this.

    Args:
        parts: values of each part that has tensors.
        texts: what rank 0 writes besides, by file name.
        step: updates made.
        consumed: samples seen.
        world: the ranks that write together.
    """
    tensors = {part: _tensors_of(values) for part, values in parts.items()}
    files: dict[str, TensorFile] = {}
    for part, own in tensors.items():
        files |= own_files(part, own, world=world)
    all_tensors = [tensor for own in tensors.values() for tensor in own.values()]
    return Snapshot(
        step=step,
        consumed=consumed,
        files=files,
        texts=dict(texts) if world.is_main else {},
        is_shared=is_shared(all_tensors),
        num_bytes=num_bytes(all_tensors) + sum(len(text) for text in texts.values()),
    )


def texts_of(
    parts: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]], *, step: int, consumed: int
) -> dict[str, bytes]:
    """Return train_state.json, which has `state`, and for each part a PART.json with what is no tensor."""
    texts = {TRAIN_STATE_NAME: _to_json({"step": step, "consumed": consumed, **state})}
    for part, values in parts.items():
        tensors = _tensors_of(values)
        rest = {name: value for name, value in values.items() if name not in tensors}
        if rest:
            texts[f"{part}.json"] = _to_json(rest)
    return texts


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of tensors with the rows of all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # of a sharded one: of the whole


def _tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _to_json(values: Mapping[str, Any]) -> bytes:
    # NaN is no JSON, and a state with NaN is no state to continue from.
    return json.dumps(values, indent=1, allow_nan=False).encode() + b"\n"


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # one pass without a temporary; both are NaN if any element is
    return bool(low.isfinite() and high.isfinite())
