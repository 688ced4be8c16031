"""What becomes of a snapshot: it is published, old checkpoints go, copies follow. Failures are survived for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clip_train.checkpoint.best import Score, read_best, write_best
from clip_train.checkpoint.last_good import read_last_good, write_last_good
from clip_train.checkpoint.manifest import Manifest, git_commit, verify
from clip_train.checkpoint.publish import FREE_FACTOR, explain, publish, require_space
from clip_train.checkpoint.retention import checkpoint_path, prune, step_of
from clip_train.checkpoint.writers import Writers
from clip_train.errors import ClipTrainError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clip_train.checkpoint.choose import StartingPoint
    from clip_train.checkpoint.config import CheckpointConfig
    from clip_train.checkpoint.copies import RemoteCopies
    from clip_train.checkpoint.snapshot import Snapshot
    from clip_train.distributed.world import World
    from clip_train.files import FileRecord

MAX_FAILURES = 3  # failed saves in a row that end training


class Commits:
    """The saves of one run, one at a time: `commit` may run in a thread, the rest is called when none is under way.

    On rank 0; ranks that write files of the same checkpoint have one, too, and hear of every error.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        world: World,
        config: CheckpointConfig,
        copies: RemoteCopies | None,
        say: Callable[[str], None],
        is_shared: bool,
    ) -> None:
        """Make the process group in which ranks meet if they write together. Every rank calls this.

        Args:
            run_dir: the run's directory.
            world: the ranks of the run.
            config: what is kept.
            copies: where copies go; None for nowhere.
            say: gets the lines a user must see.
            is_shared: tensors are sharded, and several ranks write.
        """
        self._run_dir = run_dir
        self._world = world
        self._config = config
        self._copies = copies
        self._say = say
        self._writers = Writers(world=world) if is_shared else Writers.alone()
        self._commit_id = git_commit() if world.is_main else None
        self._verified: set[Path] = set()
        self._resumed: set[Path] = set()
        self._former: Path | None = None  # the checkpoint that training went on from
        self._origin: str | None = None
        self._failures = 0  # in a row
        self.error: Exception | None = None  # of the newest save
        self.challenger: Score | None = None  # to be named best when its checkpoint stands

    def start_from(self, start: StartingPoint) -> None:
        """Keep the checkpoint that the run continues from, and remember where it came from."""
        self._origin = start.origin
        self.go_back_to(start.path)

    def go_back_to(self, path: Path) -> None:
        """Keep the checkpoint that training goes on from, in the line that it is in."""
        self._verified.add(path)
        self._resumed = {path}
        self._former = path

    def commit(self, snapshot: Snapshot, *, healthy: bool) -> None:
        """Publish a snapshot and note how it went; `healthy` if no update since the save before was refused."""
        path = checkpoint_path(self._run_dir, step=snapshot.step)
        needed = int(FREE_FACTOR * snapshot.num_bytes)
        try:
            self._writers.agree(snapshot.require_finite)
            if self._world.is_main:
                require_space(self._run_dir, needed=needed)
            publish(
                path,
                contents=snapshot.contents(),
                describe=lambda files: self._describe(snapshot, files),
                writers=self._writers,
            )
        except OSError as error:
            self._failures += 1
            self.error = ClipTrainError(f"{path} was not saved: {explain(error, folder=self._run_dir, needed=needed)}")
            self._say(f"{self.error}; older checkpoints stay (failure {self._failures} of {MAX_FAILURES} in a row)")
        except Exception as error:
            self._failures = MAX_FAILURES
            self.error = error
        else:
            self._failures = 0
            self.error = None
            if self._world.is_main:
                self._verified.add(path)
                self._keep_best(path)
                self._keep_good(path, healthy=healthy)
                self._prune()
                if self._copies is not None:
                    self._copies.mirror()

    def require_success(self, *, failures_allowed: int) -> None:
        """Raise the error of the newest save if more saves in a row have failed than are allowed."""
        error = self.error
        if error is not None and self._failures > failures_allowed:
            self.error = None  # told once; a later save may do better
            raise error

    def _keep_best(self, path: Path) -> None:
        score, self.challenger = self.challenger, None
        if score is None or checkpoint_path(self._run_dir, step=score.step) != path:
            return
        try:
            write_best(self._run_dir, score)
        except OSError as error:
            self._say(f"{path} is best by {score.metric}, but that could not be written down ({error})")

    def _keep_good(self, path: Path, *, healthy: bool) -> None:
        former, self._former = self._former, path
        if not healthy or former is None or former == path or former.parent != path.parent:
            return
        try:
            write_last_good(self._run_dir, step=step_of(former))
        except OSError as error:
            self._say(f"{former} is good, but that could not be written down ({error})")

    def _prune(self) -> None:
        try:
            best, good = read_best(self._run_dir), read_last_good(self._run_dir)
            named = {checkpoint_path(self._run_dir, step=best.step)} if best else set()
            prune(
                self._run_dir,
                keep=self._config.keep,
                milestone_every=self._config.milestone_every,
                protected=self._resumed | named | ({good} if good and self._is_verified(good) else set()),
                is_verified=self._is_verified,
            )
        except (OSError, IntegrityError) as error:
            self._say(f"{self._run_dir}: an old checkpoint could not be deleted ({error})")

    def _is_verified(self, path: Path) -> bool:
        if path not in self._verified:
            try:
                verify(path)
            except ClipTrainError:
                return False
            self._verified.add(path)
        return True

    def _describe(self, snapshot: Snapshot, files: dict[str, FileRecord]) -> Manifest:
        return Manifest(
            files=files,
            step=snapshot.step,
            consumed=snapshot.consumed,
            world=self._world.size,
            torch=torch.__version__,
            git=self._commit_id,
            origin=self._origin,
        )
