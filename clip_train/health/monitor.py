"""The one object that the training loop tells what happens, and that watches over it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from clip_train.distributed.collectives import all_gather, gather_objects
from clip_train.distributed.hosts import own_host
from clip_train.distributed.world import World, write_newest_collectives
from clip_train.errors import IntegrityError, TrainingFailed
from clip_train.health.blame import blame
from clip_train.health.doctor import Doctor, Facts
from clip_train.health.events import Events
from clip_train.health.gradients import GradientNorms, Outlier
from clip_train.health.measures import UpdateRatio, batch_measures, feature_measures
from clip_train.health.memory import explain_out_of_memory
from clip_train.health.nonfinite import NonfiniteSteps
from clip_train.health.replicas import differing_ranks
from clip_train.health.selftest import gather_errors
from clip_train.health.stragglers import Stragglers
from clip_train.health.watchdog import EXIT_CODE, Watchdog
from clip_train.schema import OnNonfinite

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from clip_train.data.delivery import StepExchange
    from clip_train.data.stream import BatchStream
    from clip_train.loss.base import Loss
    from clip_train.model.clip import CLIP
    from clip_train.schema import TrainConfig
    from clip_train.step import StepResult
    from clip_train.tokenizer.base import Tokenizer
    from clip_train.types import Batch

OUTLIER_EVERY = 1000  # steps between two outliers that are shown
STACKS_AFTER = 0.8  # of the seconds after which a collective fails
RANKS_APART = 1e-2  # relative difference from one process with which a run does not begin
REPLICAS_EVERY = 500  # steps between two comparisons of the ranks' weights


class RecordEnd(Protocol):
    """Writes `exit.json`."""

    def __call__(self, *, code: int, reason: str) -> None: ...


class RunHealth:
    """Watches one run. Every rank makes one and calls each method at the same steps. A context manager.

    Args:
        config: the run's config.
        run_dir: gets `events.jsonl`.
        world: the ranks.
        model: what is trained, unwrapped.
        loss_fn: the loss of all ranks.
        stream: where batches come from.
        exchange: what this rank waits for before a step.
        tokenizer: says how long an empty caption is.
        total_steps: length of the run.
        record_end: writes down how the run ended, on rank 0.
    """

    def __init__(
        self, config: TrainConfig, *, run_dir: Path, world: World, model: CLIP, loss_fn: Loss,
        stream: BatchStream, exchange: StepExchange, tokenizer: Tokenizer, total_steps: int,
        record_end: RecordEnd,
    ) -> None:  # fmt: skip
        self._config, self._run_dir, self._world, self._model = config, run_dir, world, model
        self._loss_fn, self._stream, self._exchange = loss_fn, stream, exchange
        self._step, self._record_end = 0, record_end
        self._doctor = Doctor(Facts.of(config, steps=total_steps))
        self._updates = UpdateRatio(model)
        self._gradients = GradientNorms()
        self._stragglers = Stragglers(world=world, exchange=exchange)
        self._gather_error = 0.0
        self._saved = time.monotonic()
        self._outlier_told = -OUTLIER_EVERY
        self._empty_length = tokenizer.encode_padded("")[1]
        self._events = Events(run_dir, rank=world.rank)
        self._nonfinite = NonfiniteSteps(config.on_nonfinite, found=self._not_finite)
        self._refused_at_save = 0  # updates, when the run was last saved
        self._compared = -1  # step at which the ranks' weights were last compared
        self._watchdog = Watchdog(
            run_dir, rank=world.rank, ranks=world.size, seconds=config.watchdog_seconds,
            stacks_after=STACKS_AFTER * config.distributed.timeout_seconds if world.size > 1 else None,
            state=self._state, loader=self._silence, sign=lambda: stream.loader_rebuilds, on_hang=self._on_hang,
            on_silence=lambda message: self._events.warn("silent_loader", message, step=self._step),
        )  # fmt: skip

    def __enter__(self) -> RunHealth:
        if self._world.size > 1:
            self._test_ranks()
        self._watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.__exit__(kind, error, trace)
        if isinstance(error, torch.OutOfMemoryError):
            micro = self._config.micro_batch_size
            assert not isinstance(micro, str), "chosen before the first step"
            message = explain_out_of_memory(
                error, model=self._model, device=self._world.device, step=self._step,
                rows=self._config.global_batch_size // self._world.size, micro_batch_size=micro,
            )  # fmt: skip
            self._events.record("out_of_memory", message, step=self._step)
            raise TrainingFailed(message) from error

    def after_step(self, result: StepResult, batch: Batch, *, step: int) -> bool:
        """Judge the run after `step` steps; return whether it is to be rewound.

        Raises:
            TrainingFailed: the step before was not finite, and the run is to stop for that.
            IntegrityError: see `compare_replicas`.
        """
        self._step = step
        self._watchdog.stepped(step)
        if self._nonfinite.watch(result, slots=batch.slots, step=step):
            self._watchdog.entered("going back to a checkpoint")
            return True
        self._gradients.add(result.grad_norm, step=step)
        self._updates.after_step(logged=step % self._config.logging.every == 0)
        if step % REPLICAS_EVERY == 0:
            self.compare_replicas(step)
        return False

    def rewound_to(self, step: int) -> None:
        """Count a rewind to `step`.

        Raises:
            TrainingFailed: it is the fourth to the same checkpoint.
        """
        self._nonfinite.rewound_to(step)

    def measures(self, result: StepResult, batch: Batch) -> dict[str, float]:
        """Return what is logged of the run's health with the newest step. It waits for the device."""
        zscore, outliers = self._gradients.judge()
        self._tell_outliers(outliers)
        times = self._stragglers.measures(self._step)
        if (warning := self._stragglers.take_warning()) and self._world.is_main:
            self._events.warn("straggler", warning, step=self._step)
        return {
            "train/nonfinite_steps": self._nonfinite.total,
            "perf/seconds_since_save": time.monotonic() - self._saved,
            **batch_measures(batch, empty_length=self._empty_length, world=self._world),
            **feature_measures(result.image_features, result.text_features),
            **self._updates.take(),
            **self._over_ranks(result),
            **zscore,
            **times,
        }

    def examine(self, row: dict[str, Any]) -> dict[str, Any]:
        """Look at a logged row, say what is wrong with the run if that has become clear, and return the row."""
        for finding in self._doctor.examine({"step": self._step, **row}) if self._world.is_main else ():
            self._events.warn("doctor", finding.message, step=self._step, signature=finding.number, name=finding.name)
        return row

    def entered(self, phase: str) -> None:
        """Tell that something longer than a step begins, such as `an evaluation`; the next step ends it."""
        self._watchdog.entered(phase)

    def before_save(self, step: int) -> bool:
        """Check what is about to be saved; return whether no update was refused since the save before.

        Raises:
            IntegrityError: see `compare_replicas`.
        """
        self.entered("a save")
        self._saved = time.monotonic()
        if self._compared != step:
            self.compare_replicas(step)
        former, self._refused_at_save = self._refused_at_save, self._nonfinite.total
        return former == self._refused_at_save

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

    def _test_ranks(self) -> None:
        """Compare the ranks with one process on a test batch, gradients included, before the first step.

        Raises:
            TrainingFailed: they compute something else; the ranks that do are named.
        """
        alone = self._config.build_loss(world=World(device=self._world.device))
        errors = gather_errors(
            self._loss_fn, alone=alone, world=self._world, embed_dim=self._model.config.embed_dim,
            has_bias=self._model.logit_bias is not None,
        )  # fmt: skip
        self._gather_error = max(errors)
        hosts = gather_objects(own_host(), world=self._world, group=self._world.host_group)
        wrong = [
            f"rank {rank} on {hosts[rank]} by {errors[rank]:.2g}"
            for rank in sorted(range(self._world.size), key=lambda rank: -errors[rank])
            if not errors[rank] <= RANKS_APART
        ]
        if wrong:
            raise TrainingFailed(
                "before the first step, loss and gradients of a test batch differ from those of one process: "
                f"{', '.join(wrong)}. A device or its connection computes wrongly, or a custom loss ignores other ranks"
            )

    def _over_ranks(self, result: StepResult) -> dict[str, float]:
        """Return what loaders had to do again, and how far the ranks are apart where they should agree.

        That is in the norm of the gradient, and in a test batch before the first step: gradients are averages, the same
        on all ranks even if each saw its own negatives only.
        """
        own = [result.grad_norm.item(), self._stream.loader_rebuilds, self._stream.transport_retries]
        gathered = all_gather(torch.tensor([own]).double(), world=self._world, group=self._world.host_group)
        norms, rebuilds, retries = gathered.unbind(1)
        counts = {"data/loader_rebuilds": rebuilds.sum().item(), "data/transport_retries": retries.sum().item()}
        if self._world.size == 1:
            return counts
        apart = float((norms.max() - norms.min()) / norms.max()) if bool(norms.isfinite().all()) else 0.0
        return counts | {"health/rank_disagreement": max(apart, self._gather_error)}

    def _tell_outliers(self, outliers: list[Outlier]) -> None:
        """Note every outlier, and show one in so many steps."""
        for found in outliers if self._world.is_main else ():
            message = (
                f"gradient norm {found.norm:.3g} in step {found.step}, where {found.usual:.3g} is usual "
                f"({found.zscore:.0f} robust standard deviations): `{self._replay(found.step)}` shows the batch"
            )
            shown = found.step - self._outlier_told >= OUTLIER_EVERY
            tell = self._events.warn if shown else self._events.record
            tell("gradient_outlier", message, step=found.step, norm=found.norm, zscore=round(found.zscore, 2))
            if shown:
                self._outlier_told = found.step

    def _not_finite(self, step: int, result: StepResult, slots: Tensor) -> str:
        where = blame(result, slots=slots, model=self._model, stream=self._stream, world=self._world)
        message = f"loss or gradient is not finite at step {step}: {where}. `{self._replay(step)}` shows the batch"
        if self._world.is_main:
            action = self._config.on_nonfinite
            tell = self._events.record if action is OnNonfinite.stop else self._events.warn
            tell("nonfinite", message, step=step, action=action.value)
        return message

    def _on_hang(self, message: str) -> None:
        self._events.record("hang", message, step=self._step)
        if self._world.is_main:
            self._record_end(code=EXIT_CODE, reason=message)
        with suppress(Exception):  # nothing may keep a process that hangs from ending
            write_newest_collectives(self._run_dir / f"rank-{self._world.rank:03d}.collectives")

    def _silence(self) -> tuple[float, str] | None:
        """Return how long this rank has waited for its own batch and why, None if it does not. From any thread."""
        since = self._exchange.loading_since
        return None if since is None else (time.monotonic() - since, self._stream.describe_loader())

    def _state(self) -> list[str]:
        """Return what this rank is waiting for. From any thread, without the device, which may hang."""
        gathering = self._exchange.gathering_since
        if loading := self._silence():
            now = f"no batch for {loading[0]:.0f} s: {loading[1]}"
        elif gathering is not None:
            now = f"its batch is ready, and for {time.monotonic() - gathering:.0f} s it has waited for the other ranks"
        else:
            now = "its batch is on the device: it computes or waits for the other ranks' numbers"
        if self._exchange.newest is None:
            return [now]
        step, first = self._exchange.newest  # of the step under way, unless this rank still waits for that one's
        last = first + self._config.global_batch_size - 1
        return [now, f"newest batch: samples {first:,} to {last:,}, `{self._replay(step)}` shows it"]

    def _replay(self, step: int) -> str:
        return f"clip-train shards replay {self._run_dir} --step {step}"
