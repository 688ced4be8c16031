"""A text for bug threads: what the doctor found, versions, settings and the end of a run, without secrets."""

from __future__ import annotations

import os
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train import __version__
from clip_train.errors import writing
from clip_train.redact import SECRET_NAME, redact
from clip_train.tools.verdict import as_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clip_train.tools.verdict import Line

# What decides how a run works. Nothing else of the environment is anyone's business.
_VARIABLES = re.compile(
    r"(CUDA|NCCL|TORCH|TORCHELASTIC|OMP|MKL|GLOO|SLURM|CLIP_TRAIN|PYTORCH|HF_HUB)_\w+|RANK|WORLD_SIZE|LOCAL_RANK"
    r"|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|HF_ENDPOINT|PYTHON\w*|LANG|LC_ALL"
)
_FILES = {"config.yaml": None, "exit.json": None, "attempts.jsonl": 20, "events.jsonl": 50, "metrics.jsonl": 20}
_LONGEST_LINE = 4000


def write_bundle(file: Path, lines: Sequence[Line], *, run_dir: Path | None) -> None:
    """Write the report to `file`.

    Raises:
        UserError: it cannot be written.
    """
    text = bundle_text(lines, run_dir=run_dir, environment=os.environ)
    with writing(f"--bundle {file}"):
        file.write_text(text, encoding="utf-8")


def bundle_text(lines: Sequence[Line], *, run_dir: Path | None, environment: Mapping[str, str]) -> str:
    """Return the report. run_dir: a run whose settings and last rows are shown, None for none."""
    libraries = sorted({f"{one.name}=={one.version}" for one in distributions() if one.name}, key=str.lower)
    variables = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if _VARIABLES.fullmatch(name) and not SECRET_NAME.search(name)
    ]
    parts = {
        f"clip-train {__version__}": as_text(lines),
        "environment": "\n".join(variables),
        "libraries": "\n".join(libraries),
    }
    for name, count in _FILES.items() if run_dir else ():
        assert run_dir is not None
        if (path := run_dir / name).is_file():
            parts[name] = _end_of(path, count)
    return _without_secrets("\n\n".join(f"## {title}\n{text}" for title, text in parts.items()) + "\n")


def _end_of(path: Path, count: int | None) -> str:
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(row[:_LONGEST_LINE] for row in (rows if count is None else rows[-count:]))


def _without_secrets(text: str) -> str:
    """Hide logins, signatures and tokens, values of keys that are named like secrets, and whose home it is."""
    text = redact(text)
    hidden = [
        re.sub(r"([:=]\s*)\S.*$", r"\1REDACTED", line) if _names_a_secret(line) else line for line in text.split("\n")
    ]
    return "\n".join(hidden).replace(str(Path.home()), "~")


def _names_a_secret(line: str) -> bool:
    """Return whether a line of settings is `NAME: value` or `NAME=value` of a secret."""
    found = re.match(r"\s*\"?([\w.-]+)\"?\s*[:=]", line)
    return found is not None and SECRET_NAME.search(found[1]) is not None
