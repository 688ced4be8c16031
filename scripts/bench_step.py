"""Speed of a whole training step against open_clip 3.3.0: forward, loss, backward, AdamW.

    python scripts/bench_step.py --peer-python PATH --json step.json         # ViT-B-32, half as wide and deep, 2 cores
    python scripts/bench_step.py --peer-python PATH --shards shards/clipart/train              # real pairs
    python scripts/bench_step.py --peer-python PATH --curve 20                                 # losses, step by step
    python scripts/bench_step.py --model tiny --batch 4096 --micro-batch 256 --precision fp32  # ours: caching
    python scripts/bench_step.py --device cuda --model ViT-B-32 --batch 2048 --precision bf16  # 80 GB

Both sides start from the same weights and see the same pictures and captions, AdamW settings, clipping and autocast. In
each round every side trains --steps steps, in turning order; ratios are medians over the rounds. Pixels are normalised
before the clock starts for open_clip, as in its loader, and within the step for us, unless --peer-normalizes. TFLOP are
those of the published architecture on real tokens: padding and recomputation do not count.

Aims, samples/s of ours over open_clip's best: 1.35 in fp32 and 1.4 in bf16 on 2 CPU cores; on an H200 in bf16 1.6 for
ViT-B-32, 1.3 for ViT-B-16 and ViT-L-14 (samples/s 8,000, ragged captions 10,500; 3,300; 870). Caching: 0.7 of the
whole batch's speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench
import torch
from bench_sides import open_clip_step, our_step

ADAMW = {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}
SEEDS = (0, 1, 2)


def main() -> None:
    """Measure as the command line says."""
    if "--worker" in sys.argv:
        bench.serve(build)
        return
    options = parse()
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(options, Path(folder))
        if options.curve:
            rows = curve(options, settings, peer=started["open_clip_torch"] is not None)
        else:
            rows = [
                row
                for precision in options.precision
                for row in speed(options, settings | {"precision": precision}, peer=started["open_clip_torch"])
            ]
            bench.print_table([{k: v for k, v in row.items() if k != "seconds"} for row in map(shown, rows)])
    bench.finish(options, started=started, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--model", default="half", help="a row of configs/model, or half: of ViT-B-32 (default half)")
    parser.add_argument("--batch", type=int, default=128, help="pairs per step (default 128)")
    parser.add_argument(
        "--micro-batch", type=int, help="compare caching in micro-batches of so many with the whole batch"
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, help="steps per side and round (default 1; on CUDA 50)")
    parser.add_argument("--warmup", type=int, help="steps before the first round (default 1; on CUDA 20)")
    parser.add_argument("--num-batches", type=int, default=2, help="different batches, taken in turn (default 2)")
    parser.add_argument("--shards", type=Path, help="take pairs from the tars of this folder")
    parser.add_argument("--max-grad-norm", type=float, help="clip on both sides (default: neither)")
    parser.add_argument("--curve", type=int, metavar="STEPS", help="compare losses over so many steps, not speed")
    parser.add_argument("--compile", action="store_true", help="compile our blocks (on CUDA: always)")
    parser.add_argument("--peer-compile", action="store_true", help="also measure open_clip compiled (on CUDA: always)")
    parser.add_argument(
        "--peer-fused", action="store_true", help="give open_clip the fused AdamW that it does not ask for"
    )
    parser.add_argument("--peer-normalizes", action="store_true", help="time open_clip's normalisation of pixels too")
    parser.add_argument(
        "--peer-block", default="default", choices=["default", "custom"],
        help="open_clip's attention: nn.MultiheadAttention, or its own",
    )  # fmt: skip
    options = parser.parse_args()
    options.steps = options.steps or (50 if options.device == "cuda" else 1)
    options.warmup = options.warmup or (20 if options.device == "cuda" else 1)
    return options


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write inputs and starting weights for all sides, and return the settings that they share."""
    from bench_inputs import drawn_pairs, mean_length, model_config, model_shape, shard_pairs, token_batch

    from clip_train.model.flops import training_flops
    from clip_train.optim.param_groups import decays

    config = model_config(options.model)
    number, size = options.batch * options.num_batches, config.vision.image_size
    if options.shards:
        images, texts = shard_pairs(options.shards, number, image_size=size, seed=0)
    else:
        images, texts = drawn_pairs(number, image_size=size, seed=0)
    tokens = token_batch(texts, context_length=config.text.context_length)
    lengths = (tokens.argmax(dim=1) + 1).tolist()
    model = config.build(seed=SEEDS[0])
    inputs = {
        "images": images.split(options.batch),
        "tokens": tokens.split(options.batch),
        "weights": model.state_dict(),
        "decayed": [name for name, parameter in model.named_parameters() if decays(name, parameter)],
    }
    torch.save(inputs, folder / "inputs.pt")
    parameters = sum(p.numel() for p in model.parameters())
    where = options.shards or "drawn from ImageNet's prompts"
    print(f"{config.name}: {parameters:,} parameters, batch {options.batch:,}")
    print(
        f"captions {where}: {mean_length(tokens):.1f} tokens on average of {config.text.context_length}\n", flush=True
    )
    return {
        "model": model_shape(config), "inputs": str(folder / "inputs.pt"), "weights": True, "seed": SEEDS[0],
        "adamw": ADAMW, "device": options.device, "threads": options.threads, "compile": False, "micro_batch": None,
        "max_grad_norm": options.max_grad_norm, "peer_fused": options.peer_fused, "peer_block": options.peer_block,
        "peer_normalizes": options.peer_normalizes, "flop_per_sample": training_flops(config, lengths=lengths) / number,
    }  # fmt: skip


def speed(options: argparse.Namespace, settings: dict[str, Any], *, peer: str | None) -> list[dict[str, Any]]:
    """Return a row per side: the first is ours, and the ratios of the others are ours over theirs."""
    cuda = options.device == "cuda"
    ours = settings | {"side": "ours", "compile": options.compile or cuda}
    sides = {"ours": (ours, sys.executable)}
    if options.micro_batch:
        sides = {
            f"cached, micro-batches of {options.micro_batch}": (
                ours | {"micro_batch": options.micro_batch},
                sys.executable,
            ),
            "whole batch": (ours, sys.executable),
        }
    elif peer:
        theirs = settings | {"side": "open_clip"}
        sides["open_clip"] = (theirs, options.peer_python)
        if options.peer_compile or cuda:
            sides["open_clip compiled"] = (theirs | {"compile": True}, options.peer_python)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(bench.Worker(__file__, python=python, settings=chosen))
            for name, (chosen, python) in sides.items()
        }
        for worker in workers.values():
            bench.one_round(worker, {"steps": options.warmup}, untimed={"steps": 0}, device=options.device)

        def side(worker: bench.Worker) -> Callable[[], float]:
            return lambda: bench.one_round(
                worker, {"steps": options.steps}, untimed={"steps": 1}, device=options.device
            )

        seconds = bench.interleaved({n: side(w) for n, w in workers.items()}, rounds=options.rounds)
    first = next(iter(seconds))
    rows = []
    for name, values in seconds.items():
        rate = options.batch * options.steps / statistics.median(values)
        rows.append(
            {
                "side": name,
                "precision": settings["precision"],
                "samples_per_second": rate,
                "tflop_per_second": rate * settings["flop_per_sample"] / 1e12,
                "ratio": None if name == first else bench.ratio(values, seconds[first]),
                "seconds": values,
            }
        )
    return rows


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people."""
    return row | {
        "samples_per_second": f"{row['samples_per_second']:.1f}",
        "ratio": bench.shown_ratio(row["ratio"]),
    }


def curve(options: argparse.Namespace, settings: dict[str, Any], *, peer: bool) -> list[dict[str, Any]]:
    """Train both sides from the same weights, and ours from other seeds, one after the other; compare the losses."""
    rows = []
    for precision in options.precision:
        ours = settings | {"precision": precision, "side": "ours", "weights": False}
        runs = {f"ours, seed {seed}": (ours | {"seed": seed}, sys.executable) for seed in SEEDS}
        if peer:
            runs["open_clip, seed 0"] = (settings | {"precision": precision, "side": "open_clip"}, options.peer_python)
        losses: dict[str, list[float]] = {}
        for name, (chosen, python) in runs.items():
            with bench.Worker(__file__, python=python, settings=chosen) as worker:
                losses[name] = worker.ask({"steps": options.curve})["losses"]
        table = [
            {"step": i, **{name: f"{values[i]:.4f}" for name, values in losses.items()}} for i in range(options.curve)
        ]
        print(f"{precision}, loss at each step")
        bench.print_table(table)
        row = {"precision": precision, "losses": losses, "seeds": spread([losses[f"ours, seed {s}"] for s in SEEDS])}
        print(f"\nlargest distance between seeds: mean {row['seeds']['mean']:.2g}, max {row['seeds']['max']:.2g}")
        if peer:
            row["sides"] = spread([losses["ours, seed 0"], losses["open_clip, seed 0"]])
            print(f"distance between sides: mean {row['sides']['mean']:.2g}, max {row['sides']['max']:.2g}\n")
        rows.append(row)
    return rows


def spread(curves: list[list[float]]) -> dict[str, float]:
    """Return mean and maximum over the steps of the largest distance between the curves."""
    distances = [max(losses) - min(losses) for losses in zip(*curves, strict=True)]
    return {"mean": statistics.mean(distances), "max": max(distances)}


def build(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build one side in a worker; it trains the asked number of steps, on from where it stands."""
    step = {"ours": our_step, "open_clip": open_clip_step}[settings["side"]](settings)
    done = 0

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        losses: list[torch.Tensor] = []
        numbers = range(done, done + request["steps"])
        seconds = bench.timed(lambda: losses.extend(step(i) for i in numbers), device=settings["device"])
        done = numbers.stop
        return {"seconds": seconds, "losses": [loss.item() for loss in losses]}

    return answer


if __name__ == "__main__":
    main()
