"""Save and resume a run: rank 0 writes and chooses, every rank takes part."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from clip_train.checkpoint.best import Score, read_best, write_best
from clip_train.checkpoint.choose import choose
from clip_train.checkpoint.copies import RemoteCopies
from clip_train.checkpoint.load import (
    TRAIN_STATE_NAME,
    load_part,
    load_train_state,
)
from clip_train.checkpoint.lock import RunLock
from clip_train.checkpoint.manifest import Manifest, git_commit, verify
from clip_train.checkpoint.publish import clear_leftovers, explain, publish, require_space
from clip_train.checkpoint.retention import checkpoint_path, prune
from clip_train.checkpoint.snapshot import take_snapshot
from clip_train.distributed.agree import on_main
from clip_train.errors import ClipTrainError, IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from clip_train.checkpoint.config import CheckpointConfig
    from clip_train.checkpoint.files import FileRecord
    from clip_train.checkpoint.snapshot import Snapshot
    from clip_train.checkpoint.state import Stateful
    from clip_train.distributed.world import World

MAX_FAILURES = 3  # failed saves in a row that end training
FREE_FACTOR = 1.3  # of the checkpoint's size must be free before a save begins


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedFrom:
    """Where training continues."""

    step: int
    path: Path
    consumed: int  # samples seen


class Checkpointer:
    """The checkpoints of one run directory, locked from construction to `close`."""

    def __init__(
        self,
        run_dir: Path,
        *,
        world: World,
        config: CheckpointConfig,
        tensors: Mapping[str, Stateful],
        state: Mapping[str, Stateful],
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Make the directory, lock it and clear what dead processes left in it. Every rank calls this.

        Args:
            run_dir: the run's directory, seen by all ranks.
            world: the ranks of the run.
            config: when and how many.
            tensors: parts that go to NAME.safetensors (and NAME.json what is no tensor).
            state: parts that go to train_state.json under their names; `step` and `consumed` are taken.
            say: gets the lines a user must see, on rank 0, also from the saving thread; by default they are printed.

        Raises:
            UserError: another process trains in the directory, or it cannot be written.
        """
        assert not {"step", "consumed"} & state.keys()
        self.run_dir = Path(run_dir)
        self.world = world
        self.config = config
        self._tensors = tensors
        self._state = state
        self._say = say or (lambda line: print(line, flush=True))
        self._copies = RemoteCopies(config.remote, run_dir=self.run_dir, say=self._say) if config.remote else None
        self._lock: RunLock | None = None
        self._saving: threading.Thread | None = None
        self._error: Exception | None = None  # of the newest finished save
        self._failures = 0  # in a row
        self._verified: set[Path] = set()
        self._resumed: set[Path] = set()
        self._challenger: Score | None = None  # to be named best when its checkpoint stands
        self._origin: str | None = None
        self._commit_id = git_commit() if world.is_main else None
        self._leftovers = on_main(self._prepare, world=self.world)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_best(self, metrics: Mapping[str, float], *, step: int) -> bool:
        """Return whether these metrics of the weights at `step` beat the best of the run. Every rank calls this.

        Raises:
            UserError: `checkpoint.best` is not among them.
            IntegrityError: the record of the best is damaged.
        """
        metric = self.config.best
        if metric is None:
            return False
        self._settle()

        def judge() -> bool:
            score = Score.of(metrics, metric=metric, step=step)
            self._challenger = score if score and score.beats(read_best(self.run_dir)) else None
            return self._challenger is not None

        return on_main(judge, world=self.world)

    def save(
        self, *, step: int, consumed: int, config_yaml: str, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Path:
        """Save every part and return where the checkpoint stands once it is published. Every rank calls this.

        If `is_best` has just said so, it becomes the best checkpoint of the run.
        `files`, by name, are what else the model needs, such as its tokenizer's.

        With `asynchronous`, this returns when the parts are copied to CPU memory; `wait` returns when they are on disk.
        A full or failing disk is survived twice in a row: the line says so and the older checkpoints stay.

        Raises:
            ClipTrainError: a tensor is not finite, or the third save in a row failed; for an asynchronous save at the
                next call.
        """
        self._settle()
        tensors = {name: dict(part.state_dict()) for name, part in self._tensors.items()}
        state = {name: dict(part.state_dict()) for name, part in self._state.items()}

        def begin() -> None:
            texts = {**files, "config.yaml": config_yaml.encode()}
            snapshot = take_snapshot(tensors, state, step=step, consumed=consumed, files=texts)
            if self.config.asynchronous:
                self._saving = threading.Thread(target=self._commit, args=(snapshot,), name="checkpoint", daemon=True)
                self._saving.start()
            else:
                self._commit(snapshot)

        on_main(begin, world=self.world)
        if not self.config.asynchronous:
            self._settle()
        return checkpoint_path(self.run_dir, step=step)

    def wait(self) -> None:
        """Return when the newest save is on disk. Every rank calls this.

        Raises:
            ClipTrainError: it failed.
        """
        self._settle(failures_allowed=0)

    def close(self, *, timeout_seconds: float = 600.0) -> None:
        """Wait for a save under way and give the run directory free. Needs no other rank: it also follows a failure."""
        if self._saving is not None:
            self._saving.join(timeout_seconds)
            if self._saving.is_alive():
                self._say(f"{self.run_dir}: the last checkpoint was not written within {timeout_seconds:.0f} s")
        if self._error is not None:
            self._say(f"the last save failed: {self._error}")
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def resume(self, mode: str) -> ResumedFrom | None:
        """Load every part and say from where, or return None for a fresh start. Every rank calls this.

        Args:
            mode: `auto` takes the newest intact checkpoint of this run; `never` starts from scratch and moves existing
                checkpoints aside; a path takes that checkpoint or the newest of that run, and when the same command
                is started again, this run's newest that came from it.

        Raises:
            UserError: nothing at the path, a newer format, or a checkpoint that does not fit the parts.
            IntegrityError: there are checkpoints and none is intact.
        """
        self._settle()
        chosen = on_main(lambda: self._choose(mode), world=self.world)
        if chosen is None:
            return None
        # Rank 0 has verified its choice; every rank reads the same files.
        manifest = Manifest.read(chosen)
        try:
            self._load(chosen)
        except UserError as error:
            raise UserError(f"{chosen}: {error}") from error
        return ResumedFrom(step=manifest.step, path=chosen, consumed=manifest.consumed)

    def _prepare(self) -> list[str]:
        folder = self.run_dir / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.run_dir, say=self._say)
            return clear_leftovers(folder)
        except OSError as error:
            self.close()
            raise UserError(f"run_dir={self.run_dir} cannot be written: {error}") from error

    def _choose(self, mode: str) -> Path | None:
        """Choose and verify what to load, on rank 0."""
        start = choose(self.run_dir, mode=mode, copies=self._copies, leftovers=self._leftovers, say=self._say)
        if start is None:
            return None
        self._origin = start.origin
        self._verified.add(start.path)
        self._resumed = {start.path}
        return start.path

    def _load(self, chosen: Path) -> None:
        train_state = load_train_state(chosen)
        missing = [name for name in self._state if name not in train_state]
        if missing:
            raise UserError(f"no {', '.join(missing)} in {TRAIN_STATE_NAME}")
        for name, part in self._tensors.items():
            part.load_state_dict(load_part(chosen, name))
        for name, part in self._state.items():
            part.load_state_dict(train_state[name])

    def _commit(self, snapshot: Snapshot) -> None:
        """Publish on rank 0, perhaps in the saving thread, and note how it went."""
        path = checkpoint_path(self.run_dir, step=snapshot.step)
        needed = int(FREE_FACTOR * snapshot.num_bytes)
        try:
            snapshot.require_finite()
            require_space(self.run_dir, needed=needed)
            publish(path, contents=snapshot.contents(), describe=lambda files: self._describe(snapshot, files))
        except OSError as error:
            self._failures += 1
            self._error = ClipTrainError(f"{path} was not saved: {explain(error, folder=self.run_dir, needed=needed)}")
            self._say(f"{self._error}; older checkpoints stay (failure {self._failures} of {MAX_FAILURES} in a row)")
        except Exception as error:
            self._failures = MAX_FAILURES
            self._error = error
        else:
            self._failures = 0
            self._error = None
            self._verified.add(path)
            self._keep_best(path)
            self._prune()
            if self._copies is not None:
                self._copies.mirror()

    def _keep_best(self, path: Path) -> None:
        score, self._challenger = self._challenger, None
        if score is None or checkpoint_path(self.run_dir, step=score.step) != path:
            return
        try:
            write_best(self.run_dir, score)
        except OSError as error:
            self._say(f"{path} is best by {score.metric}, but that could not be written down ({error})")

    def _prune(self) -> None:
        try:
            best = read_best(self.run_dir)
            prune(
                self.run_dir,
                keep=self.config.keep,
                milestone_every=self.config.milestone_every,
                protected=self._resumed | ({checkpoint_path(self.run_dir, step=best.step)} if best else set()),
                is_verified=self._is_verified,
            )
        except (OSError, IntegrityError) as error:
            self._say(f"{self.run_dir}: an old checkpoint could not be deleted ({error})")

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
            world=self.world.size,
            torch=torch.__version__,
            git=self._commit_id,
            origin=self._origin,
        )

    def _settle(self, *, failures_allowed: int = MAX_FAILURES - 1) -> None:
        """Join the save under way and raise on every rank if it failed once too often."""

        def join() -> None:
            if self._saving is not None:
                self._saving.join()
                self._saving = None
            error = self._error
            if error is not None and self._failures > failures_allowed:
                self._error = None  # told once; a later save may do better
                raise error

        on_main(join, world=self.world)
