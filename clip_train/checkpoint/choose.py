"""Choose the checkpoint that a run continues from. Rank 0 does this for all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clip_train.checkpoint.best import BEST_NAME, read_best
from clip_train.checkpoint.last_good import LAST_GOOD_NAME, read_last_good
from clip_train.checkpoint.load import find_checkpoint, newest_verified
from clip_train.checkpoint.manifest import Manifest
from clip_train.checkpoint.retention import checkpoint_path, list_checkpoints, set_aside
from clip_train.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clip_train.checkpoint.copies import RemoteCopies

    Say = Callable[[str], None]


class StartingPoint(NamedTuple):
    """A verified checkpoint, and the one that `resume=PATH` began its line of training with."""

    path: Path
    origin: str | None


def choose(
    run_dir: Path, *, mode: str, copies: RemoteCopies | None, leftovers: Sequence[str], say: Say
) -> StartingPoint | None:
    """Return the verified checkpoint to load, None for a fresh start.

    Args:
        run_dir: the run's directory.
        mode: see `Checkpointer.resume`.
        copies: where to look if the directory has no checkpoint; None for nowhere.
        leftovers: names of unfinished saves, for the message.
        say: gets the lines a user must see.

    Raises:
        UserError: nothing is at the path, or the checkpoint has a newer format.
        IntegrityError: there are checkpoints and none is intact.
    """
    if mode == "never":
        _set_aside(run_dir, newer_than=-1, say=say)
        return None
    if mode != "auto":
        return _choose_path(run_dir, Path(mode), say=say)
    if not list_checkpoints(run_dir) and copies is not None:
        copy = copies.fetch_newest()
        if copy is not None:
            say(f"{run_dir}: no checkpoint here; fetched {copy.name} from {copies.folder}")
    if not list_checkpoints(run_dir):
        unfinished = f", only unfinished saves ({', '.join(leftovers)})" if leftovers else ""
        say(f"{run_dir}: no checkpoint{unfinished}; starting from scratch")
        return None
    try:
        chosen = newest_verified(run_dir, say=say)
    except IntegrityError as error:
        raise IntegrityError(f"{error}; resume=never starts from scratch") from error
    return StartingPoint(chosen, Manifest.read(chosen).origin)


def _choose_path(run_dir: Path, path: Path, *, say: Say) -> StartingPoint:
    """Return the checkpoint that `resume=PATH` means: a requeued command goes on from its own newest."""
    asked = find_checkpoint(path, say=say)
    origin = str(asked.resolve())
    own = _newest_from(run_dir, origin=origin, say=say)
    if own is not None:
        say(f"resume={path}: continuing from {own}, which came from there")
        return StartingPoint(own, origin)
    step = Manifest.read(asked).step
    is_own = asked.resolve().parent == (run_dir / "checkpoints").resolve()
    _set_aside(run_dir, newer_than=step if is_own else -1, say=say)
    return StartingPoint(checkpoint_path(run_dir, step=step) if is_own else asked, origin)


def _newest_from(run_dir: Path, *, origin: str, say: Say) -> Path | None:
    if not list_checkpoints(run_dir):
        return None
    try:
        own = newest_verified(run_dir, say=say)
    except IntegrityError:
        return None
    return own if Manifest.read(own).origin == origin else None


def _set_aside(run_dir: Path, *, newer_than: int, say: Say) -> None:
    folder = set_aside(run_dir, newer_than=newer_than)
    if folder is None:
        return
    say(f"moved {len(list(folder.iterdir()))} checkpoints of a line that was left to {folder}")
    for name, named in ((BEST_NAME, read_best(run_dir)), (LAST_GOOD_NAME, read_last_good(run_dir))):
        note = run_dir / "checkpoints" / name
        if named is None and note.exists():  # a later checkpoint of the same step is another one
            note.rename(folder / name)
