"""`MANIFEST.json`: what a checkpoint must contain, to the bit. Written last: without it there is no checkpoint."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_train.errors import IntegrityError, UserError
from clip_train.files import FileRecord, hash_file

FORMAT = 2  # 1 knew no sharded tensors; it is still read
MANIFEST_NAME = "MANIFEST.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of one checkpoint and where it came from."""

    files: dict[str, FileRecord]
    step: int
    consumed: int  # samples seen
    world: int  # ranks that wrote it; any number may read it
    torch: str
    git: str | None  # commit of clip_train, where it runs from a clone
    origin: str | None  # the `resume=PATH` this line of training started from

    def to_bytes(self) -> bytes:
        """Return the file's bytes, which carry their own hash: a flipped bit in the manifest shows as well."""
        return _canonical({"format": FORMAT, **asdict(self)})

    @staticmethod
    def read(checkpoint_dir: Path) -> Manifest:
        """Read and check the manifest of a checkpoint, not yet its other files.

        Raises:
            IntegrityError: there is no manifest, or it is damaged.
            UserError: a newer clip-train wrote it.
        """
        path = checkpoint_dir / MANIFEST_NAME
        try:
            raw = path.read_bytes()
            values: dict[str, Any] = json.loads(raw)
            stated = {key: value for key, value in values.items() if key != "sha256"}
            intact = raw == _canonical(stated)
        except FileNotFoundError:
            raise IntegrityError(f"{checkpoint_dir.name}: {MANIFEST_NAME} missing") from None
        except (OSError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{checkpoint_dir.name}: {MANIFEST_NAME} unreadable ({error})") from error
        if not intact:
            raise IntegrityError(f"{checkpoint_dir.name}: {MANIFEST_NAME} sha256 mismatch")
        if stated.pop("format") > FORMAT:
            raise UserError(
                f"{path}: format {values['format']}, this clip-train reads up to {FORMAT}: update clip-train"
            )
        files = {name: FileRecord(**record) for name, record in stated.pop("files").items()}
        return Manifest(files=files, **stated)


def verify(checkpoint_dir: Path) -> Manifest:
    """Hash every file of a checkpoint, compare with the manifest, and return it.

    Raises:
        IntegrityError: a file is missing, cut or changed; the message names it.
        UserError: a newer clip-train wrote the checkpoint.
    """
    manifest = Manifest.read(checkpoint_dir)
    for name, stated in manifest.files.items():
        if Path(name).name != name:
            raise IntegrityError(f"{checkpoint_dir.name}: {name} is no name of a file")
        try:
            found = hash_file(checkpoint_dir / name)
        except FileNotFoundError:
            raise IntegrityError(f"{checkpoint_dir.name}: {name} missing") from None
        except OSError as error:
            raise IntegrityError(f"{checkpoint_dir.name}: {name} unreadable ({error})") from error
        if found.bytes != stated.bytes:
            raise IntegrityError(f"{checkpoint_dir.name}: {name} has {found.bytes} bytes, not {stated.bytes}")
        if found.sha256 != stated.sha256:
            raise IntegrityError(f"{checkpoint_dir.name}: {name} sha256 mismatch")
    return manifest


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the clone that this package runs from, None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _canonical(values: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_dump(values)).hexdigest()
    return _dump({**values, "sha256": digest})


def _dump(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"
