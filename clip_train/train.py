"""Train a CLIP model. Read this first: the whole run is the one function `train`, from top to bottom.

shard -> Batch -> model(images, tokens) -> Features -> loss -> backward -> optimizer -> Progress -> log / evaluate / save
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_train.checkpoint.checkpointer import Checkpointer
from clip_train.checkpoint.state import ModelState, OptimizerState
from clip_train.config import TrainConfig, changes, to_yaml
from clip_train.data.loader import TrainStream
from clip_train.distributed.collectives import broadcast_object
from clip_train.distributed.parallel import parallelize
from clip_train.distributed.stop import StopReason, StopRequest
from clip_train.distributed.world import World, stop_world
from clip_train.errors import Preempted, UserError
from clip_train.evaluate import run_evaluations
from clip_train.metrics.log import Metrics
from clip_train.metrics.panel import say
from clip_train.optim.schedule import learning_rate
from clip_train.step import TrainStep


class Progress:
    """How far the run is. `samples_seen` alone decides which sample comes next."""

    def __init__(self, stream: TrainStream) -> None:
        self.step = 0
        self.samples_seen = 0
        self.stream = stream

    def advance(self, num_samples: int) -> None:
        """Count one optimizer step over `num_samples` pairs of all ranks."""
        self.step += 1
        self.samples_seen += num_samples

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: two counters and the identity of the data they count."""
        return {"step": self.step, "samples_seen": self.samples_seen, "data": self.stream.state_dict(self.samples_seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; the data must be what it was."""
        self.stream.check(state["data"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]


def train(config: TrainConfig) -> dict[str, float]:
    """Train as `config` says, continuing where its run directory stands. Returns the last value of every metric.

    Raises:
        UserError: the config cannot work, or contradicts the run it would continue.
        IntegrityError: data or every checkpoint is damaged.
        Preempted: a signal asked for a stop; everything is saved.
    """
    with ExitStack() as stack:
        # Build the parts. Every rank builds the same ones; only device and rows of the batch differ.
        world = config.distributed.build(device=config.device)
        stack.callback(stop_world)
        stop = stack.enter_context(StopRequest(max_hours=config.max_hours))
        run_dir = open_run(config, world=world)
        tokenizer = config.tokenizer.build(context_length=config.model.text.context_length)
        stream = config.data.build_train(
            world=world, seed=config.seed, global_batch_size=config.global_batch_size,
            tokenizer=tokenizer, image_size=config.model.vision.image_size,
        )  # fmt: skip
        stack.callback(stream.close)
        total_steps = config.total_steps(stream.num_samples)
        model = config.model.build(seed=config.seed).to(world.device)
        wrapped = parallelize(model, world=world, config=config.distributed)
        optimizer = config.optim.build(model)
        train_step = TrainStep(
            wrapped, model=model, loss_fn=config.loss.build(world=world), optimizer=optimizer, world=world, seed=config.seed,
            precision=config.precision.value, micro_batch_size=config.micro_batch_size, max_grad_norm=config.optim.max_grad_norm,
        )  # fmt: skip
        evaluators = {
            name: evaluation.build(world=world, tokenizer=tokenizer, image_size=config.model.vision.image_size)
            for name, evaluation in config.evaluation.items()
        }

        # Resume. Rank 0 chooses the checkpoint, every rank loads it.
        progress = Progress(stream)
        checkpointer = Checkpointer(
            run_dir, world=world, config=config.checkpoint, state={"progress": progress},
            tensors={"model": ModelState(wrapped), "optimizer": OptimizerState(wrapped, optimizer)},
        )  # fmt: skip
        stack.callback(checkpointer.close)
        checkpointer.resume(config.resume)
        metrics = Metrics(
            run_dir, world=world, config=config.logging, name=config.name, total_steps=total_steps,
            global_batch_size=config.global_batch_size, start_step=progress.step, settings=asdict(config),
        )  # fmt: skip
        stack.callback(metrics.close)
        announce(config, world=world, stream=stream, progress=progress, total_steps=total_steps)
        latest: dict[str, float] = {}
        reason = StopReason.none
        batches = stream.batches(progress.samples_seen)

        while progress.step < total_steps and not reason:
            # One global batch: each rank its own rows, negatives from all ranks.
            asked = time.monotonic()
            batch = next(batches)
            seconds_waiting = time.monotonic() - asked
            rate = learning_rate(
                progress.step, peak=config.optim.lr, warmup=config.optim.warmup, total_steps=total_steps,
                schedule=config.optim.schedule,
            )  # fmt: skip
            result = train_step(batch, learning_rate=rate, step=progress.step)
            progress.advance(config.global_batch_size)
            metrics.add(result.metrics, seconds_waiting=seconds_waiting)

            # All ranks reach each of these at the same step; only rank 0 writes.
            if due(progress.step, every=config.logging.every, total=total_steps):
                train_step.check_finite(config.on_nonfinite, step=progress.step)
                extra = {"train/learning_rate": rate, **{f"data/bad_{k}": v for k, v in stream.counters().items()}}
                latest |= metrics.log(step=progress.step, samples_seen=progress.samples_seen, extra=extra)
            if names := [
                n for n, e in config.evaluation.items() if due(progress.step, every=e.every, total=total_steps)
            ]:
                scores = run_evaluations({n: evaluators[n] for n in names}, model, run_dir=run_dir, step=progress.step)
                latest |= scores
                metrics.write(scores, step=progress.step, samples_seen=progress.samples_seen)
                metrics.restart_window()
            reason = stop.agreed(world=world)
            if reason or due(progress.step, every=config.checkpoint.every, total=total_steps):
                checkpointer.save(step=progress.step, consumed=progress.samples_seen, config_yaml=to_yaml(config))
                metrics.restart_window()
        checkpointer.wait()
    if reason is StopReason.preempted:
        raise Preempted(f"asked to stop: saved at step {progress.step}; the same command continues there")
    return latest


def due(step: int, *, every: int | None, total: int) -> bool:
    """Return whether a periodic action is due after `step` steps: each `every` steps and at the end; null or 0 is never."""
    return bool(every) and (step % every == 0 or step == total)
