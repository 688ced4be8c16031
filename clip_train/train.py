"""Train a CLIP model. Read this first: the whole run is the one function `train`, from top to bottom.

shard -> Batch -> model(images, tokens) -> Features -> loss -> optimizer -> Progress -> log / evaluate / save

What it computes stands in three files: the two towers in model/clip.py, the contrastive loss over all ranks in
loss/clip.py, and forward, backward and update of one global batch in step.py.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.attempts import Attempt
from clip_train.checkpoint.state import ModelState, OptimizerState, Stateful
from clip_train.config import to_yaml
from clip_train.data.bad import LEDGER_FOLDER
from clip_train.data.delivery import StepExchange
from clip_train.data.prefetch import batches_on
from clip_train.distributed.stop import StopReason, StopRequest
from clip_train.distributed.world import stop_world
from clip_train.errors import Preempted
from clip_train.evaluate import Evaluations
from clip_train.files import replace_file
from clip_train.health.monitor import RunHealth
from clip_train.initial_weights import build_model
from clip_train.locked_tower import cache_features
from clip_train.metrics.hardware import peak_flops
from clip_train.metrics.log import Metrics
from clip_train.metrics.panel import say
from clip_train.metrics.profile import StepProfiler
from clip_train.micro_batch import choose_micro_batch
from clip_train.model.finetune import layers_above
from clip_train.model.flops import training_flops
from clip_train.progress import Progress, rewind, skip_samples
from clip_train.schema import TrainConfig
from clip_train.starting_point import check_ranks, require_same_run, suited_to
from clip_train.step import TrainStep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clip_train.checkpoint.checkpointer import ResumedFrom
    from clip_train.data.stream import BatchStream
    from clip_train.distributed.world import World
    from clip_train.model.clip import CLIP
    from clip_train.model.config import Ragged


def train(config: TrainConfig) -> dict[str, float]:
    """Train as `config` says, continuing where its run directory stands. Returns the newest value of every metric.

    Raises:
        UserError: the config cannot work, or contradicts the run that it would continue.
        IntegrityError: data or every checkpoint is damaged.
        TrainingFailed: numbers are no longer finite.
        Preempted: a signal asked for a stop; everything is saved.
    """
    with ExitStack() as stack:
        # Build the parts. Every rank builds the same ones; only its device and its rows of a batch differ.
        run_dir = Path(config.run_dir)
        stop = stack.enter_context(StopRequest(max_hours=config.max_hours))
        attempt = stack.enter_context(Attempt(run_dir))
        world = attempt.join(config.distributed.build(device=config.device), config=config.distributed)
        stack.callback(stop_world)
        check_ranks(config, world=world)
        tokenizer = config.tokenizer.build(
            context_length=config.model.text.context_length, kept_in=None if config.resume == "never" else run_dir
        )
        config = suited_to(tokenizer, config=config)
        require_same_run(config, folder=run_dir, world=world)
        stream = config.data.build_train(
            world=world,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            tokenizer=tokenizer,
            image_size=config.model.vision.image_size,
        )
        stack.callback(stream.close)
        total_steps = config.total_steps(stream.num_samples)
        model = build_model(config, world=world, tokenizer=tokenizer)
        precision = config.precision.value
        wrapped = config.distributed.parallelize(
            model, world=world, precision=precision, compile_blocks=config.model.compile
        )
        above = layers_above(model) if config.optim.layer_decay < 1 else None
        optimizer = config.optim.build(model, layers_above=above)
        ema = config.optim.build_ema(model)
        micro_batch_size = choose_micro_batch(config, model=model, optimizer=optimizer, world=world, wanted=stop.wanted)
        config = replace(config, micro_batch_size=micro_batch_size)
        loss_fn = config.build_loss(world=world)
        train_step = TrainStep(
            model, wrapped=wrapped, loss_fn=loss_fn, optimizer=optimizer, ema=ema, world=world,
            seed=config.seed, precision=precision, max_grad_norm=config.optim.max_grad_norm,
            micro_batch_size=micro_batch_size,
        )  # fmt: skip
        captions = model.layout(world.device, dtype=train_step.dtype)
        evaluations = Evaluations(config, model=model, ema=ema, tokenizer=tokenizer, world=world, wanted=stop.wanted)
        progress = Progress(stream, global_batch_size=config.global_batch_size)

        # Resume. Rank 0 chooses the checkpoint, every rank loads it; without one, step 0 is where the run begins.
        tensors: dict[str, Stateful] = {"model": ModelState(wrapped), "optimizer": OptimizerState(wrapped, optimizer)}
        if ema is not None:
            tensors["ema"] = ema
        checkpointer = config.checkpoint.build(
            run_dir=run_dir, world=world, tensors=tensors, say=say,
            state={"progress": progress, "loss_scale": train_step.loss_scale},
        )  # fmt: skip
        stack.callback(checkpointer.close)
        resumed = checkpointer.resume(
            config.resume, check=lambda folder: require_same_run(config, folder=folder, world=world)
        )
        skip_samples(progress, config=config, resumed_from=resumed.path if resumed else None)
        attempt.begin(progress.step)
        cache_features(config, model=model, stream=stream, run_dir=run_dir, world=world, wanted=stop.wanted)

        # Watch. Rank 0 writes down what the run is and its metrics; every rank looks after its own batches and health.
        metrics = Metrics(
            run_dir, world=world, config=config.logging, name=config.name, total_steps=total_steps,
            global_batch_size=config.global_batch_size, start_step=progress.step,
            loss_of_guessing=config.loss.loss_of_guessing(config.global_batch_size),
            evaluate_again=progress.owes_evaluation, settings=asdict(config),
            peak_flops=peak_flops(world.device, precision=precision),
        )  # fmt: skip
        stack.callback(metrics.close)
        profiler = StepProfiler(config.profiled_steps(), run_dir=run_dir, world=world)
        stack.callback(profiler.close)
        if world.is_main:
            begin_run(config, run_dir=run_dir, files=tokenizer.files())
            say_start(
                config, resumed=resumed, total_steps=total_steps, stream=stream, model=model, world=world,
                captions=captions,
            )  # fmt: skip
        exchange = StepExchange(
            stream, batches=batches_on(world.device, stream.batches(progress.samples_seen)), run_dir=run_dir,
            world=world, step=progress.step, consumed=progress.samples_seen,
        )  # fmt: skip
        stack.callback(exchange.close)
        health = stack.enter_context(
            RunHealth(
                config, run_dir=run_dir, world=world, model=model, loss_fn=loss_fn, stream=stream, exchange=exchange,
                tokenizer=tokenizer, total_steps=total_steps, record_end=attempt.record_end,
            )
        )  # fmt: skip

        def save() -> None:
            checkpointer.save(
                step=progress.step, consumed=progress.samples_seen, config_yaml=to_yaml(config),
                files=tokenizer.files(), healthy=health.before_save(progress.step),
            )  # fmt: skip

        newest: dict[str, float] = {}

        def evaluate_and_save() -> StopReason:
            """Do what is due after a step. All ranks; asked to stop amid an evaluation, they leave it together."""
            chosen = [n for n, e in config.evaluation.items() if due(progress.step, every=e.every, total=total_steps)]
            best = progress.owes_evaluation = False
            if chosen:
                health.entered("an evaluation")
                with metrics.paused():
                    scores, reason = evaluations.run(chosen, step=progress.step, samples=progress.step == total_steps)
                if reason:
                    progress.owes_evaluation = True
                    return reason
                metrics.write(scores, step=progress.step, samples_seen=progress.samples_seen)
                newest.update(scores)
                best = checkpointer.is_best(scores, step=progress.step)
            if best or due(progress.step, every=config.checkpoint.every, total=total_steps):
                save()
            return StopReason.none

        # A run that was stopped amid an evaluation begins with it.
        reason = evaluate_and_save() if progress.owes_evaluation else StopReason.none
        while progress.step < total_steps and not reason:
            # Every rank fetches its rows; then all ranks train on theirs, or all stop for what one of them reports.
            profiler.before(progress.step + 1)
            asked = time.monotonic()
            batch, reason = exchange.next(step=progress.step + 1, stop=stop.wanted())
            seconds_waiting = time.monotonic() - asked
            if batch is None:
                break

            # One global batch: each rank its own rows, negatives from all ranks.
            learning_rate = config.optim.learning_rate(progress.step, total_steps=total_steps)
            result = train_step(batch, learning_rate=learning_rate, step=progress.step)
            progress.advance(config.global_batch_size)
            attempt.stepped(progress.step)
            flops = training_flops(config.model, lengths=batch.lengths.tolist())
            metrics.add(result.measures(), seconds_waiting=seconds_waiting, flops=flops)
            profiler.after(progress.step)
            if health.after_step(result, batch, step=progress.step):
                # Every rank saw the same flag: weights go back, the data goes on after the bad batch.
                rewind(checkpointer, progress=progress)
                health.rewound_to(progress.step)
                metrics.rewind(progress.step)
                continue

            if due(progress.step, every=config.logging.every, total=total_steps):
                bad = {f"data/bad_{kind}": count for kind, count in stream.counters().items()}
                values = {"train/learning_rate": learning_rate, **health.measures(result, batch), **bad}
                row = metrics.log(step=progress.step, samples_seen=progress.samples_seen, extra=values)
                newest |= health.examine(row)
            reason = evaluate_and_save()
        if progress.step > checkpointer.saved_step:
            save()
        health.finish()
        checkpointer.wait()
        attempt.finish(reason)
        if world.is_main:
            say_end(progress, reason=reason, run_dir=run_dir)
        if reason is StopReason.preempted:
            raise Preempted(f"asked to stop: {progress.kept()}")
    return newest


def due(step: int, *, every: int | None, total: int) -> bool:
    """Return whether a periodic action is due after `step` steps: every so many (null or 0: not), and at the end."""
    return step == total or (every is not None and every > 0 and step % every == 0)


def begin_run(config: TrainConfig, *, run_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write down what the run is, for those who load it and for the same command given again."""
    for name, content in {**files, "config.yaml": to_yaml(config).encode()}.items():
        replace_file(run_dir / name, content)


def say_start(
    config: TrainConfig, *, resumed: ResumedFrom | None, total_steps: int, stream: BatchStream, model: CLIP,
    world: World, captions: Ragged,
) -> None:  # fmt: skip
    """Say what is about to be trained, on what and from where."""
    start = f"continuing {resumed.path} at step {resumed.step:,}" if resumed else f"starting {config.run_dir}"
    say(f"{start}: {total_steps:,} steps of {config.global_batch_size:,} pairs from {stream.num_samples:,}")
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = f"{whole:,} parameters" + (f", {trained:,} of them trained," if trained < whole else "")
    where = f"{world.size} x {world.device.type}, {config.precision.value}, captions: ragged={captions.value}"
    say(f"{config.model.name}, {count} on {where}")


def say_end(progress: Progress, *, reason: StopReason, run_dir: Path) -> None:
    """Say what became of the data, and why a run stopped before its end."""
    if counts := progress.stream.counters():
        listed = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        say(f"samples that could not be used: {listed}; each is listed in {run_dir / LEDGER_FOLDER}")
    if reason in (StopReason.time_limit, StopReason.interrupted):
        why = reason.name.replace("_", " ")
        say(f"stopped ({why}): {progress.kept()}")
