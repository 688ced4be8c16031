"""The one object that the training loop tells what happens, and that watches over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.errors import IntegrityError
from clip_train.health.events import Events
from clip_train.health.nonfinite import NonfiniteSteps
from clip_train.health.replicas import differing_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from clip_train.distributed.world import World
    from clip_train.schema import TrainConfig
    from clip_train.step import StepResult

REPLICAS_EVERY = 500  # steps between two comparisons of the ranks' weights


class RunHealth:
    """Watches one run. Every rank makes one and calls each method at the same steps.

    Args:
        config: the run's config.
        run_dir: gets `events.jsonl`.
        world: the ranks.
        model: what is trained, unwrapped.
    """

    def __init__(self, config: TrainConfig, *, run_dir: Path, world: World, model: nn.Module) -> None:
        self._run_dir, self._world, self._model = run_dir, world, model
        self._events = Events(run_dir, rank=world.rank)
        self._nonfinite = NonfiniteSteps(config.on_nonfinite)
        self._compared = -1  # step at which the ranks' weights were last compared

    def after_step(self, result: StepResult, *, step: int) -> bool:
        """Judge the run after `step` steps; return whether it is to be rewound.

        Raises:
            TrainingFailed: the step before was not finite, and the run is to stop for that.
            IntegrityError: see `compare_replicas`.
        """
        if self._nonfinite.watch(result, step=step):
            return True
        if step % REPLICAS_EVERY == 0:
            self.compare_replicas(step)
        return False

    def rewound_to(self, step: int) -> None:
        """Count a rewind to `step`.

        Raises:
            TrainingFailed: it is the fourth to the same checkpoint.
        """
        self._nonfinite.rewound_to(step)

    def counters(self) -> dict[str, float]:
        """Return the counts that are logged."""
        return {"train/nonfinite_steps": self._nonfinite.total}

    def before_save(self, step: int) -> None:
        """Check what is about to be saved.

        Raises:
            IntegrityError: see `compare_replicas`.
        """
        if self._compared != step:
            self.compare_replicas(step)

    def compare_replicas(self, step: int) -> None:
        """Check that all ranks hold the same weights.

        Raises:
            IntegrityError: on every rank, naming the ranks that differ.
        """
        self._compared = step
        if self._world.size == 1:
            return
        found = differing_ranks(self._model, world=self._world)
        if found is None:
            return
        ranks = " and ".join(map(str, found.ranks))
        message = (
            f"the ranks no longer hold the same weights after step {step}: rank {ranks} differs from the others, first "
            f"in {found.tensor}. A memory or a kernel gave a wrong bit; leave that machine out and start the same "
            "command again, which continues from the newest checkpoint"
        )
        if self._world.is_main:
            self._events.record("replicas_differ", message, step=step, ranks=found.ranks, tensor=found.tensor)
        raise IntegrityError(message)

    def finish(self) -> None:
        """Judge the last step.

        Raises:
            TrainingFailed: it was not finite, and the run is to stop for that.
        """
        self._nonfinite.judge(last=True)
