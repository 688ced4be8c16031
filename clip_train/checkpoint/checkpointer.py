"""Save and resume a run: rank 0 writes and chooses, every rank takes part."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from clip_train.checkpoint.best import Score, read_best
from clip_train.checkpoint.choose import choose
from clip_train.checkpoint.commit import MAX_FAILURES, Commits
from clip_train.checkpoint.copies import RemoteCopies
from clip_train.checkpoint.load import (
    TRAIN_STATE_NAME,
    find_checkpoint,
    load_part,
    load_train_state,
    newest_verified,
)
from clip_train.checkpoint.lock import RunLock
from clip_train.checkpoint.manifest import Manifest
from clip_train.checkpoint.publish import FREE_FACTOR, clear_leftovers, explain, require_space
from clip_train.checkpoint.retention import checkpoint_path, list_checkpoints
from clip_train.checkpoint.snapshot import num_bytes, take_snapshot, texts_of
from clip_train.checkpoint.tensors import is_shared
from clip_train.distributed.agree import on_main
from clip_train.errors import ClipTrainError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from clip_train.checkpoint.config import CheckpointConfig
    from clip_train.checkpoint.state import Stateful
    from clip_train.distributed.world import World

MAX_SAVE_SECONDS = 1800.0  # a disk that takes longer has failed


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
        self.saved_step = 0  # steps done at the newest save, or where training continues
        self._tensors = tensors
        self._state = state
        self._say = (say or (lambda line: print(line, flush=True))) if world.is_main else (lambda line: None)
        self._copies = RemoteCopies(config.remote, run_dir=self.run_dir, say=self._say) if config.remote else None
        self._lock: RunLock | None = None
        self._saving: threading.Thread | None = None
        self._start: Path | None = None  # what this attempt resumed from; on rank 0
        held = [v for part in tensors.values() for v in part.state_dict().values() if isinstance(v, torch.Tensor)]
        self._commits = Commits(
            self.run_dir, world=world, config=config, copies=self._copies, say=self._say, is_shared=is_shared(held)
        )
        needed = int(FREE_FACTOR * num_bytes(held))
        self._leftovers = on_main(lambda: self._prepare(needed), world=self.world)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_best(self, metrics: Mapping[str, float], *, step: int) -> bool:
        """Return whether these metrics of the weights at `step` beat the best of the run. Every rank calls this.

        Raises:
            IntegrityError: the record of the best is damaged.
        """
        metric = self.config.best
        if metric is None:
            return False
        self._settle()

        def judge() -> bool:
            score = Score.of(metrics, metric=metric, step=step)
            self._commits.challenger = score if score and score.beats(read_best(self.run_dir)) else None
            return self._commits.challenger is not None

        return on_main(judge, world=self.world)

    def save(
        self,
        *,
        step: int,
        consumed: int,
        config_yaml: str,
        files: Mapping[str, bytes] = MappingProxyType({}),
        healthy: bool = True,
    ) -> Path:
        """Save every part and return where the checkpoint stands once it is published. Every rank calls this.

        If `is_best` has just said so, it becomes the best checkpoint of the run.
        `files`, by name, are what else the model needs, such as its tokenizer's. If the run was `healthy`, with no
        update refused since the save before, that save's checkpoint becomes the last good one and stays.

        With `asynchronous`, this returns when the parts are copied to CPU memory; `wait` returns when they are on disk.
        A full or failing disk is survived twice in a row: the line says so and the older checkpoints stay.

        Raises:
            ClipTrainError: a tensor is not finite, or the third save in a row failed; for an asynchronous save at the
                next call.
        """
        self._settle()
        parts = {name: part.state_dict() for name, part in self._tensors.items()}
        state = {name: part.state_dict() for name, part in self._state.items()}
        texts = {**files, "config.yaml": config_yaml.encode()} if self.world.is_main else {}
        on_main(lambda: texts.update(texts_of(parts, state, step=step, consumed=consumed)), world=self.world)
        snapshot = take_snapshot(parts, texts=texts, step=step, consumed=consumed, world=self.world)
        if not self.config.asynchronous and self.world.size == 1:
            self._commits.commit(snapshot, healthy=healthy)
        elif snapshot.is_shared or self.world.is_main:
            # In a thread also where training waits: the ranks that wait hear from this one in `_settle`.
            commit = partial(self._commits.commit, snapshot, healthy=healthy)
            self._saving = threading.Thread(target=commit, name="checkpoint", daemon=True)
            self._saving.start()
        if not self.config.asynchronous:
            self._settle()
        self.saved_step = step
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
        if self._commits.error is not None:
            self._say(f"the last save failed: {self._commits.error}")
        self._release()

    def resume(self, mode: str, *, check: Callable[[Path], None] = lambda path: None) -> ResumedFrom | None:
        """Load every part and say from where, or return None for a fresh start. Every rank calls this.

        Args:
            mode: `auto` takes the newest intact checkpoint of this run; `never` starts from scratch and moves existing
                checkpoints aside; a path takes that checkpoint or the newest of that run, and when the same command
                is started again, this run's newest that came from it.
            check: refuses a checkpoint before anything of it is loaded, by an error of its own on every rank.

        Raises:
            UserError: nothing at the path, a newer format, or a checkpoint that does not fit the parts.
            IntegrityError: there are checkpoints and none is intact.
        """
        self._settle()
        chosen = on_main(lambda: self._choose(mode), world=self.world)
        if chosen is not None:
            check(chosen)
        return self._resume_from(chosen)

    def go_back(self) -> ResumedFrom | None:
        """Load the newest intact save again, or what this attempt resumed from while it has saved nothing.

        Every rank calls this. It returns None if there is neither.

        Raises:
            ClipTrainError: the save under way failed.
            IntegrityError: there are checkpoints and none is intact.
        """
        self.wait()
        return self._resume_from(on_main(self._choose_former, world=self.world))

    def _prepare(self, needed: int) -> list[str]:
        folder = self.run_dir / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.run_dir, say=self._say)
            leftovers = clear_leftovers(folder)
            require_space(folder, needed=needed)
        except OSError as error:
            self._release()
            reason = explain(error, folder=self.run_dir, needed=needed)
            raise UserError(f"run_dir={self.run_dir} cannot be written: {reason}") from error
        return leftovers

    def _choose(self, mode: str) -> Path | None:
        """Choose and verify what to load, on rank 0."""
        start = choose(self.run_dir, mode=mode, copies=self._copies, leftovers=self._leftovers, say=self._say)
        if start is None:
            return None
        self._commits.start_from(start)
        self._start = start.path
        return start.path

    def _choose_former(self) -> Path | None:
        """Choose and verify what to go back to, on rank 0."""
        if list_checkpoints(self.run_dir):
            former: Path | None = newest_verified(self.run_dir, say=self._say)
        else:
            former = find_checkpoint(self._start) if self._start else None
        if former is not None:
            self._commits.go_back_to(former)
        return former

    def _resume_from(self, chosen: Path | None) -> ResumedFrom | None:
        if chosen is None:
            return None
        # Rank 0 has verified its choice; every rank reads the same files.
        manifest = Manifest.read(chosen)
        try:
            self._load(chosen)
        except UserError as error:
            raise UserError(f"{chosen}: {error}") from error
        self.saved_step = manifest.step
        return ResumedFrom(step=manifest.step, path=chosen, consumed=manifest.consumed)

    def _load(self, chosen: Path) -> None:
        train_state = load_train_state(chosen)
        missing = [name for name in self._state if name not in train_state]
        if missing:
            raise UserError(f"no {', '.join(missing)} in {TRAIN_STATE_NAME}")
        for name, part in self._tensors.items():
            part.load_state_dict(load_part(chosen, name))
        for name, part in self._state.items():
            part.load_state_dict(train_state[name])

    def _settle(self, *, failures_allowed: int = MAX_FAILURES - 1) -> None:
        """Join the save under way and raise on every rank if it failed once too often."""

        def join() -> None:
            if self._saving is not None:
                self._saving.join(MAX_SAVE_SECONDS)
                if self._saving.is_alive():
                    raise ClipTrainError(
                        f"{self.run_dir}: a checkpoint was not written within {MAX_SAVE_SECONDS / 60:.0f} minutes"
                    )
            self._commits.require_success(failures_allowed=failures_allowed)

        try:
            on_main(join, world=self.world)
        finally:
            if self._saving is not None:
                # That of another rank ends when rank 0's has heard from all; that of rank 0 has ended, or never will.
                self._saving.join(0 if self.world.is_main else MAX_SAVE_SECONDS)
                self._saving = None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
