"""An export appears whole or not at all, and takes the place of nothing but an export.

`clip-train evaluate` writes into the folder of the model that it measures, exports included. Its results stay with the
weights: an export that has the same ones keeps them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_train.calibration import CALIBRATION_FILE
from clip_train.errors import UserError, writing
from clip_train.interop.open_clip import WEIGHT_FILES

RECORD_FILE = "clip_train.json"
REPORT_FILE = "export_report.json"
CARD_FILE = "README.md"
RESULTS_FOLDER = "evaluation"
RESULT_SUFFIXES = (".json", ".npz", ".csv")


def check_replaceable(out: Path) -> None:
    """Check that `out` is free, or an export without anything added.

    Raises:
        UserError: it holds something that replacing it would delete.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    if not present:
        return
    try:
        known = set(json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {out} holds files and is no export (no readable {RECORD_FILE}): name another") from None
    known |= {RECORD_FILE, REPORT_FILE, CARD_FILE, CALIBRATION_FILE}
    if foreign := sorted(name for name in present - known if not _is_result(Path(name))):
        raise UserError(f"--out {out} is an export with a file that is not part of it: {foreign[0]}; name another")


def _is_result(name: Path) -> bool:
    return name.parts[0] == RESULTS_FOLDER and name.suffix in RESULT_SUFFIXES


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a private folder beside `out` that takes its place when the context ends without an error.

    Raises:
        UserError: the place cannot be written to.
    """
    part = out.parent / f".part-{out.name}-{os.getpid()}"
    with writing(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    try:
        yield part
        if out.exists():
            stale = out.parent / f".stale-{out.name}-{os.getpid()}"
            out.rename(stale)
            part.rename(out)
            _keep_results(stale, out)
            shutil.rmtree(stale)
        else:
            part.rename(out)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(part):
            raise
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _keep_results(former: Path, new: Path) -> None:
    """Move what `clip-train evaluate` wrote into the former export to the new one, if it measured the same weights."""
    if not (former / RESULTS_FOLDER).is_dir():
        return
    if _weights_hash(former) == _weights_hash(new) is not None:
        (former / RESULTS_FOLDER).rename(new / RESULTS_FOLDER)
    else:
        print(f"{new / RESULTS_FOLDER}: results of the weights that were here before, deleted with them")


def _weights_hash(folder: Path) -> str | None:
    """Return the hash of the weights that `clip_train.load` reads, None where an export has none."""
    files = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["files"]
    return str(files[WEIGHT_FILES[0]]["sha256"]) if WEIGHT_FILES[0] in files else None
