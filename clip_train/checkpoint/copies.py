"""Copies of a run's checkpoints elsewhere: the machine may be lost, the run is not.

A copy's manifest is stored last and deleted first, so that a copy with a manifest is whole.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from clip_train.checkpoint.best import BEST_NAME
from clip_train.checkpoint.manifest import MANIFEST_NAME, Manifest, verify
from clip_train.checkpoint.publish import private_name
from clip_train.checkpoint.retention import checkpoint_path, is_checkpoint_name, list_checkpoints, step_of
from clip_train.errors import ClipTrainError, IntegrityError
from clip_train.storage.remote import delete, download, list_names, read_file, upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class RemoteCopies:
    """The copies of one run's checkpoints below a URL.

    Args:
        url: a folder of this run alone, such as `s3://bucket/runs/NAME`.
        run_dir: the run's directory here.
        say: gets a line for each copy that failed.
    """

    def __init__(self, url: str, *, run_dir: Path, say: Callable[[str], None]) -> None:
        self.folder = f"{url.rstrip('/')}/checkpoints"
        self._run_dir = run_dir
        self._say = say
        self._stored: dict[str, bytes] = {}  # name -> manifest of what is known to be there

    def mirror(self) -> None:
        """Store every checkpoint of the run that is not there yet, then delete the copies that are gone here.

        A failure is told and does not stop the run: the next save tries again.
        """
        here = {path.name: path for path in list_checkpoints(self._run_dir)}
        try:
            for name in sorted(here):
                self._store(here[name])
            best = self._run_dir / "checkpoints" / BEST_NAME
            if best.is_file():
                upload(best, f"{self.folder}/{BEST_NAME}")
            for name in self.names():
                if name not in here:
                    self._delete(name)
        except (ClipTrainError, OSError) as error:
            self._say(f"the copies below {self.folder} are behind, the next save tries again: {error}")

    def fetch_newest(self) -> Path | None:
        """Fetch the newest whole copy into the run directory, verify it and return it; None if there is none.

        Raises:
            UserError: the place is forbidden.
            IntegrityError: it cannot be reached, or there are copies and none is intact.
        """
        skipped = []
        for name in sorted(self.names(), key=lambda name: step_of(self._run_dir / name), reverse=True):
            target = checkpoint_path(self._run_dir, step=step_of(self._run_dir / name))
            part = private_name(target, kind="part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                download(f"{self.folder}/{name}/{MANIFEST_NAME}", part / MANIFEST_NAME, size=None, sha256=None)
                for file, record in Manifest.read(part).files.items():
                    download(f"{self.folder}/{name}/{file}", part / file, size=record.bytes, sha256=record.sha256)
                verify(part)
            except IntegrityError as error:
                shutil.rmtree(part)
                skipped.append(f"{self.folder}/{name}: {error}")
                self._say(f"skipped {skipped[-1]}")
            else:
                part.rename(target)
                return target
        if skipped:
            raise IntegrityError(f"none of {len(skipped)} copies is intact ({'; '.join(skipped[:3])})")
        return None

    def names(self) -> list[str]:
        """Return the names of the copies that are whole.

        Raises:
            UserError: the place is forbidden.
            IntegrityError: it cannot be reached.
        """
        found = [name for name in list_names(self.folder) if is_checkpoint_name(name)]
        return [name for name in found if MANIFEST_NAME in list_names(f"{self.folder}/{name}")]

    def _store(self, checkpoint: Path) -> None:
        copy = f"{self.folder}/{checkpoint.name}"
        manifest = checkpoint / MANIFEST_NAME
        content = manifest.read_bytes()
        if self._stored.get(checkpoint.name) == content:
            return
        stored = read_file(f"{copy}/{MANIFEST_NAME}")
        if stored != content:
            if stored is not None:  # of the same step before a rewind
                self._delete(checkpoint.name)
            for file in Manifest.read(checkpoint).files:
                upload(checkpoint / file, f"{copy}/{file}")
            upload(manifest, f"{copy}/{MANIFEST_NAME}")
        self._stored[checkpoint.name] = content

    def _delete(self, name: str) -> None:
        self._stored.pop(name, None)
        delete(f"{self.folder}/{name}/{MANIFEST_NAME}")
        delete(f"{self.folder}/{name}")
