"""Which checkpoints a run directory holds, and which of them may go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.checkpoint.publish import remove

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(run_dir: Path, *, step: int) -> Path:
    """Return where the checkpoint of `step` stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint_dir: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint_dir.name)
    assert match, checkpoint_dir
    return int(match[1])


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the published checkpoints of a run, newest first, not verified."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if is_checkpoint_name(path.name)), key=step_of, reverse=True)


def prune(
    run_dir: Path,
    *,
    keep: int,
    milestone_every: int | None,
    protected: Collection[Path],
    is_verified: Callable[[Path], bool],
) -> list[Path]:
    """Delete what is older than the `keep` newest verified checkpoints, and return it.

    Milestones and `protected` stay. A damaged checkpoint does not count, so it never costs a good one its place.
    """
    deleted = []
    verified = 0
    for path in list_checkpoints(run_dir):
        if verified < keep:
            verified += is_verified(path)
        elif path not in protected and not (milestone_every and step_of(path) % milestone_every == 0):
            remove(path)
            deleted.append(path)
    return deleted


def set_aside(run_dir: Path, *, newer_than: int) -> Path | None:
    """Move checkpoints of a later step than `newer_than` into a folder that no resume looks into, and return it.

    They belong to a line of training that was left; deleting them is the user's decision.
    """
    left = [path for path in list_checkpoints(run_dir) if step_of(path) > newer_than]
    if not left:
        return None
    taken = {path.name for path in (run_dir / "checkpoints").glob("set-aside-*")}
    number = next(n for n in range(1, len(taken) + 2) if f"set-aside-{n}" not in taken)
    folder = run_dir / "checkpoints" / f"set-aside-{number}"
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    return folder
