"""Find the checkpoint to read, and read its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.checkpoint.manifest import MANIFEST_NAME, verify
from clip_train.checkpoint.retention import list_checkpoints
from clip_train.checkpoint.tensors import open_tensors
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TRAIN_STATE_NAME = "train_state.json"


def newest_verified(run_dir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Return the newest checkpoint of a run whose every file is intact; `say` gets a line for each one passed over.

    Raises:
        UserError: the run has no checkpoint, or the newest was written by a newer clip-train.
        IntegrityError: it has some and none is intact.
    """
    skipped = []
    for path in list_checkpoints(run_dir):
        try:
            verify(path)
        except IntegrityError as error:
            skipped.append(str(error))
            say(f"skipped {error}")
        else:
            return path
    if not skipped:
        raise UserError(f"{run_dir}: no checkpoint in this run directory")
    raise IntegrityError(f"{run_dir}: none of {len(skipped)} checkpoints is intact ({'; '.join(skipped[:3])})")


def find_checkpoint(path: Path, *, say: Callable[[str], None] = print) -> Path:
    """Return the verified checkpoint that `path`, a checkpoint or a run directory, stands for.

    Raises:
        UserError: there is nothing like that at `path`.
        IntegrityError: the checkpoint, or every one of the run, is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run directory")
    if (path / "checkpoints").is_dir():
        return newest_verified(path, say=say)
    if not (path / MANIFEST_NAME).exists() and not path.name.startswith("step-"):
        raise UserError(f"{path}: neither a run directory (no checkpoints/) nor a checkpoint (no {MANIFEST_NAME})")
    verify(path)
    return path


def load_tensors(checkpoint_dir: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of a part (`model`, `ema`, `optimizer`) on the CPU. Verify the checkpoint first.

    Raises:
        UserError: the checkpoint has no such part.
        IntegrityError: some of it is missing.
    """
    return {name: tensor[...] for name, tensor in open_tensors(checkpoint_dir, part).items()}


def load_part(checkpoint_dir: Path, part: str) -> dict[str, Any]:
    """Return what the part's `state_dict()` was, with tensors that are read when rows of them are asked for.

    Verify the checkpoint first.

    Raises:
        UserError: the checkpoint has no such part.
        IntegrityError: some of it is missing.
    """
    values: dict[str, Any] = {**open_tensors(checkpoint_dir, part)}
    rest = checkpoint_dir / f"{part}.json"
    if rest.exists():
        values.update(json.loads(rest.read_text()))
    return values


def load_train_state(checkpoint_dir: Path) -> dict[str, Any]:
    """Return `train_state.json`. Verify the checkpoint first."""
    return json.loads((checkpoint_dir / TRAIN_STATE_NAME).read_text())
