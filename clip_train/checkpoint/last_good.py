"""The last checkpoint that is known to be good: training went on from it to a later save without a refused update.

The newest one may hold weights that are finite and already lost. `checkpoints/last_good.json` names the one to go back
to, and it stays however many are saved after it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from clip_train.checkpoint.retention import checkpoint_path
from clip_train.errors import IntegrityError
from clip_train.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

LAST_GOOD_NAME = "last_good.json"


def read_last_good(run_dir: Path) -> Path | None:
    """Return the last good checkpoint if it still stands, None without one. It is not verified.

    Raises:
        IntegrityError: `last_good.json` is damaged.
    """
    path = run_dir / "checkpoints" / LAST_GOOD_NAME
    try:
        found = checkpoint_path(run_dir, step=int(json.loads(path.read_text(encoding="utf-8"))["step"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); delete it to let the next save decide") from error
    return found if found.is_dir() else None


def write_last_good(run_dir: Path, *, step: int) -> None:
    """Name the last good checkpoint."""
    replace_file(run_dir / "checkpoints" / LAST_GOOD_NAME, json.dumps({"step": step}).encode() + b"\n")
