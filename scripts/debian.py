"""Fetch a Debian package and unpack it, without root and without touching the system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from clip_train.errors import UserError


def fetch_package(name: str, *, folder: Path) -> Path:
    """Download the package `name` into `folder`, unpack it there, and return the folder that stands for its `/`.

    Raises:
        UserError: this is not Debian, or the package cannot be fetched.
    """
    if missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]:
        raise UserError(f"this needs Debian or a relative of it; {' and '.join(missing)} not found")
    private = [
        f"--option=Dir::State::Lists={folder / 'lists'}",
        f"--option=Dir::Cache={folder / 'cache'}",
        "--option=APT::Sandbox::User=",  # apt's own user may not write into our folder
    ]
    if not (folder / "lists").exists():
        for place in ("lists/partial", "cache/archives/partial"):
            (folder / place).mkdir(parents=True)
        _run(["apt-get", *private, "update"], folder=folder)
    _run(["apt-get", *private, "download", name], folder=folder)
    (package,) = folder.glob(f"{name}_*.deb")
    _run(["dpkg", "-x", str(package), str(folder / name)], folder=folder)
    return folder / name


def _run(command: list[str], *, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise UserError(f"`{command[0]} {command[-1]}` failed: {reason[-1] if reason else 'no message'}")
