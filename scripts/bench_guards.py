"""What the guards of a run cost: each timed alone, as a share of a training step; and how long a save holds it up.

    python scripts/bench_guards.py                                           # ViT-B-32, B = 4,096, on 2 cores
    python scripts/bench_guards.py --device cuda --precision bf16 --step-rows 2048

The step is taken with --step-rows pairs and its time scaled to --batch; the guards see the whole batch. Guards that run
every so many steps count by that share. A save is asynchronous: what counts is how long the trainer waits for the copy.
Not in the sum, as they run beside the trainer: loader processes' notes, hashing and writing of checkpoints.

Aims: all guards at most 1 % of a step; a save at most one step. Exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch

LOG_EVERY = 20
NOTES_PER_SAMPLE = 2
MOST_OF_GUARDS, MOST_OF_A_SAVE = 0.01, 1.0  # steps


class Idle:
    """The stream and the exchange of a run that is not under way."""

    loading_since = gathering_since = None
    seconds_loading, consumed, loader_rebuilds, transport_retries = 0.0, 0, 0, 0

    def describe_loader(self) -> str:
        return ""


def main() -> int:
    """Measure as the command line says; return the exit status."""
    options = parse()
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as folder:
        step_seconds, guards, save_seconds = measure(options, Path(folder))
    rows = [
        {"guard": name, "every": every, "seconds": seconds, "share": seconds / every / step_seconds}
        for name, every, seconds in guards
    ]
    total = sum(row["share"] for row in rows)
    rows.append({"guard": "all guards", "every": 1, "seconds": total * step_seconds, "share": total})
    rows.append({"guard": "save", "every": None, "seconds": save_seconds, "share": save_seconds / step_seconds})
    print(f"a step of {options.batch:,} pairs: {step_seconds:.3g} s\n")
    bench.print_table([shown(row) for row in rows])
    bench.finish(options, started=started, rows=[*rows, {"step_seconds": step_seconds}])
    missed = total > MOST_OF_GUARDS or save_seconds > MOST_OF_A_SAVE * step_seconds
    print("above the aims" if missed else "within the aims")
    return int(missed)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--model", default="ViT-B-32", help="a row of configs/model (default ViT-B-32)")
    parser.add_argument("--batch", type=int, default=4096, help="pairs per step (default 4096)")
    parser.add_argument("--step-rows", type=int, default=64, help="pairs of the step that is timed (default 64)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> tuple[float, list[tuple[str, int, float]], float]:
    """Return the seconds of a step; name, period in steps and seconds of each guard; the seconds of a save."""
    from clip_train.checkpoint.config import CheckpointConfig
    from clip_train.checkpoint.state import ModelState, OptimizerState
    from clip_train.config import load
    from clip_train.data.activity import Activity, Doing
    from clip_train.distributed.world import World
    from clip_train.health.monitor import REPLICAS_EVERY, RunHealth
    from clip_train.health.replicas import bit_hash
    from clip_train.loss.clip import ClipLoss
    from clip_train.step import TrainStep
    from clip_train.types import Batch

    torch.set_num_threads(options.threads)
    world = World(device=torch.device(options.device))
    config = load(
        "train",
        [
            f"model={options.model}", "data.train=none", "steps=1000000", f"global_batch_size={options.batch}",
            f"logging.every={LOG_EVERY}", f"precision={options.precision}",
        ],
    )  # fmt: skip
    model = config.model.build(seed=0).to(world.device)
    optimizer = config.optim.build(model, layers_above=None)
    loss_fn = ClipLoss(world=world)
    step = TrainStep(
        model, wrapped=model, loss_fn=loss_fn, optimizer=optimizer, world=world, seed=0, precision=options.precision,
    )  # fmt: skip
    batch = draw(options.batch, config=config)
    few = Batch(*(t[: options.step_rows] for t in batch)).to(world.device)

    def timed(run: Callable[[], object]) -> float:
        return statistics.median(bench.timed(run, device=options.device) for _ in range(options.rounds))

    results: list[Any] = [step(few, learning_rate=1e-4, step=0)]
    seconds = timed(lambda: step(few, learning_rate=1e-4, step=1)) * options.batch / options.step_rows
    result = results[0]._replace(
        image_features=torch.randn(options.batch, model.config.embed_dim, device=world.device),
        text_features=torch.randn(options.batch, model.config.embed_dim, device=world.device),
    )
    batch = batch.to(world.device)
    idle: Any = Idle()
    health = RunHealth(
        config, run_dir=folder, world=world, model=model, loss_fn=loss_fn, stream=idle, exchange=idle,
        tokenizer=config.tokenizer.build(context_length=config.model.text.context_length), total_steps=1_000_000,
        record_end=lambda **_: None,
    )  # fmt: skip
    health.after_step(result, batch, step=1)

    def steps() -> None:
        for number in range(LOG_EVERY):
            health.after_step(result, batch, step=REPLICAS_EVERY * 10 + 1 + number)

    def row() -> None:
        measured = health.measures(result, batch)
        health.examine({"train/loss": 5.0, "train/in_batch_recall@1": 0.1, "train/logit_scale": 20.0, **measured})

    def hashes() -> None:
        torch.stack([bit_hash(parameter) for parameter in model.parameters()]).tolist()

    look = timed(lambda: [health._watchdog._watch_loader() for _ in range(100)]) / 100
    activity = Activity(1)
    note = timed(lambda: [activity.note(Doing.reading, worker=0) for _ in range(1000)]) / 1000
    print(f"two notes of a loader process about a sample: {1e6 * NOTES_PER_SAMPLE * note:.2g} µs")
    guards = [
        ("after each step", 1, timed(steps) / LOG_EVERY),
        ("measures and doctor", LOG_EVERY, timed(row)),
        ("hash of the weights", REPLICAS_EVERY, timed(hashes)),
        ("watchdog, a look a second", 1, look * seconds),
    ]
    parts = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    saving = CheckpointConfig(asynchronous=True, keep=2)
    saves = []
    with saving.build(run_dir=folder, world=world, tensors=parts, state={}) as checkpoints:

        def save() -> None:
            checkpoints.save(step=len(saves), consumed=0, config_yaml="")

        for _ in range(options.rounds):
            saves.append(bench.timed(save, device=options.device))
            checkpoints.wait()
    return seconds, guards, statistics.median(saves)


def draw(rows: int, *, config: Any) -> Any:
    """Return a batch of noise and captions of random words, each another."""
    from clip_train.types import Batch

    size, length = config.model.vision.image_size, config.model.text.context_length
    seed = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, length, (rows,), generator=seed)
    tokens = torch.randint(1, 40_000, (rows, length), generator=seed)
    tokens[torch.arange(length)[None] >= lengths[:, None]] = 0
    end = config.model.text.vocab_size - 1
    tokens[torch.arange(rows), lengths - 1] = end
    return Batch(
        images=torch.randint(0, 256, (rows, size, size, 3), generator=seed, dtype=torch.uint8),
        tokens=tokens.clamp(max=end), lengths=lengths, slots=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people."""
    every = "" if row["every"] is None else f"{row['every']} steps"
    share = f"{row['share']:.2f} steps" if row["every"] is None else f"{100 * row['share']:.3f} %"
    return {"guard": row["guard"], "every": every, "seconds": f"{row['seconds']:.3g}", "of a step": share}


if __name__ == "__main__":
    sys.exit(main())
