"""How far a run is, and going back when it must."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_train.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from clip_train.checkpoint.checkpointer import Checkpointer
    from clip_train.data.stream import BatchStream
    from clip_train.schema import TrainConfig


class Stretch(NamedTuple):
    """From a step on, the samples follow each other in batches of one size."""

    step: int  # steps done before
    samples_seen: int
    global_batch_size: int


class Progress:
    """How far the run is. `samples_seen` alone decides which sample comes next."""

    def __init__(self, stream: BatchStream, *, global_batch_size: int) -> None:
        self.step = 0
        self.samples_seen = 0
        self.stream = stream
        self.global_batch_size = global_batch_size
        self.owes_evaluation = False  # stopped amid those that are due after this step
        self.stretches = [Stretch(0, 0, global_batch_size)]  # from which `shards replay` knows the samples of a step

    def advance(self, num_samples: int) -> None:
        """Count one step over `num_samples` pairs of all ranks."""
        self.step += 1
        self.samples_seen += num_samples

    def skip(self, num_samples: int) -> None:
        """Leave out the next `num_samples` pairs, rounded up to whole batches."""
        self.samples_seen += -(-num_samples // self.global_batch_size) * self.global_batch_size
        self.stretches.append(Stretch(self.step, self.samples_seen, self.global_batch_size))

    def kept(self) -> str:
        """Say what a stop leaves: everything is saved by then."""
        if self.step == 0:
            return "before the first step; the same command starts there"
        return f"saved at step {self.step:,}; the same command continues there"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: two counters, what is left to do, the identity of the data they count."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "owes_evaluation": self.owes_evaluation,
            "stretches": [list(stretch) for stretch in self.stretches],
            "data": self.stream.state_dict(self.samples_seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the data must be what it was, or a new segment was asked for."""
        self.stream.load_state_dict(state["data"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.owes_evaluation = state.get("owes_evaluation", False)  # older checkpoints have no such word
        self.stretches = [Stretch(*row) for row in state["stretches"]]
        if self.stretches[-1].global_batch_size != self.global_batch_size:
            self.stretches.append(Stretch(self.step, self.samples_seen, self.global_batch_size))

    def keep_place(self, state: dict[str, Any]) -> None:
        """After the weights went back, go on with the data where `state` was."""
        self.stream.load_state_dict(state["data"])
        self.samples_seen = state["samples_seen"]
        self.owes_evaluation = False
        self.stretches.append(Stretch(self.step, self.samples_seen, self.global_batch_size))


def skip_samples(progress: Progress, *, config: TrainConfig, resumed_from: Path | None) -> None:
    """Leave out what `data.skip_samples` says, if the run has just begun at the checkpoint that `resume` names.

    A run that continues from a checkpoint of its own has left them out already.

    Raises:
        UserError: `resume` names the run itself, of which every newer checkpoint would skip again.
    """
    if not config.data.skip_samples or resumed_from is None:
        return
    named = Path(config.resume).resolve()
    if named == Path(config.run_dir).resolve():
        raise UserError(f"data.skip_samples: resume={config.resume} must name one checkpoint, {resumed_from} perhaps")
    if named in (resumed_from.resolve(), *resumed_from.resolve().parents):
        progress.skip(config.data.skip_samples)


def rewind(checkpointer: Checkpointer, *, progress: Progress) -> None:
    """Load the newest checkpoint, perhaps the one resumed from, but keep the place in the data. Every rank calls it.

    Raises:
        TrainingFailed: there is none yet.
    """
    before = progress.state_dict()
    if checkpointer.go_back() is None:
        raise TrainingFailed("not finite before the first checkpoint: nothing to rewind to; lower checkpoint.every")
    progress.keep_place(before)
