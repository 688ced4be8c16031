"""Speed of the text tower, forward and backward, by length of the captions, against padding and open_clip 3.3.0.

    python scripts/bench_text.py --peer-python PATH --json text.json
    python scripts/bench_text.py --peer-python PATH --shards shards/clipart/train
    python scripts/bench_text.py --device cuda --model ViT-B-32 --batch 2048 --precision bf16

Lengths: `prompts` are single zero-shot prompts (10 tokens on average), `web` has the mean and the tail of web captions
(20 to 22), `full` fills the context; with --shards, `shards` are the real captions. The sides are ours with captions
computed at their length, ours with all padding, and open_clip; inputs, starting weights and autocast are the same.
Expected where the tower alone is timed: about the ratio of context to mean length, less for the shortest.
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
from bench_sides import autocast_of, open_clip_model, our_model
from torch import Tensor


def main() -> None:
    """Measure as the command line says."""
    if "--worker" in sys.argv:
        bench.serve(build)
        return
    options = parse()
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as folder:
        settings, lengths = prepare(options, Path(folder))
        rows = [
            row
            for precision in options.precision
            for row in speed(options, settings | {"precision": precision}, lengths=lengths)
        ]
    bench.print_table([shown(row) for row in rows])
    bench.finish(options, started=started, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--model", default="half", help="a row of configs/model, or half: of ViT-B-32 (default half)")
    parser.add_argument("--batch", type=int, default=128, help="captions (default 128)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--lengths", nargs="+", default=["prompts", "web", "full"], choices=["prompts", "web", "full"])
    parser.add_argument("--ragged", default="auto", help="model.ragged of our ragged side (default auto)")
    parser.add_argument("--shards", type=Path, help="also measure the captions in the tars of this folder")
    parser.add_argument("--repeats", type=int, help="passes per side and round (default 1; on CUDA 50)")
    parser.add_argument("--warmup", type=int, help="passes before the first round (default 1; on CUDA 20)")
    parser.add_argument("--peer-block", default="default", choices=["default", "custom"], help="open_clip's attention")
    options = parser.parse_args()
    options.repeats = options.repeats or (50 if options.device == "cuda" else 1)
    options.warmup = options.warmup or (20 if options.device == "cuda" else 1)
    return options


def prepare(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Write captions and starting weights for all sides; return the settings and the mean length of each batch."""
    from bench_inputs import captions, mean_length, model_config, model_shape, shard_pairs, token_batch

    config = model_config(options.model)
    texts = {name: captions(options.batch, seed=0, lengths=name) for name in options.lengths}
    if options.shards:
        texts["shards"] = shard_pairs(options.shards, options.batch, image_size=config.vision.image_size, seed=0)[1]
    tokens = {name: token_batch(t, context_length=config.text.context_length) for name, t in texts.items()}
    torch.save({"tokens": tokens, "weights": config.build(seed=0).state_dict()}, folder / "inputs.pt")
    settings = {
        "model": model_shape(config), "inputs": str(folder / "inputs.pt"), "seed": 0, "device": options.device,
        "threads": options.threads, "peer_block": options.peer_block,
    }  # fmt: skip
    print(f"{config.name}: text tower, {options.batch:,} captions\n", flush=True)
    return settings, {name: mean_length(t) for name, t in tokens.items()}


def speed(options: argparse.Namespace, settings: dict[str, Any], *, lengths: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row per kind of captions."""
    sides = {
        "ours": (settings | {"side": "ours", "ragged": options.ragged}, sys.executable),
        "ours_padded": (settings | {"side": "ours", "ragged": "off"}, sys.executable),
    }
    if bench.peer_version(options.peer_python):
        sides["open_clip"] = (settings | {"side": "open_clip"}, options.peer_python)
    rows = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(bench.Worker(__file__, python=python, settings=chosen))
            for name, (chosen, python) in sides.items()
        }
        for captions, mean in lengths.items():

            def side(worker: bench.Worker, captions: str = captions) -> Callable[[], float]:
                def ask(passes: int, untimed: int) -> float:
                    once, timed = ({"captions": captions, "passes": n} for n in (untimed, passes))
                    return bench.one_round(worker, timed, untimed=once, device=options.device)

                ask(options.warmup, untimed=0)
                return lambda: ask(options.repeats, untimed=1)

            seconds = bench.interleaved({n: side(w) for n, w in workers.items()}, rounds=options.rounds)
            rows.append(
                {"captions": captions, "mean_length": mean, "precision": settings["precision"], "seconds": seconds}
                | {
                    f"{name}_per_second": options.batch * options.repeats / statistics.median(values)
                    for name, values in seconds.items()
                }
                | {
                    f"over_{name}": bench.ratio(values, seconds["ours"])
                    for name, values in seconds.items()
                    if name != "ours"
                }
            )
    return rows


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people."""
    return {k: bench.shown_ratio(v) if k.startswith("over_") else v for k, v in row.items() if k != "seconds"}


def build(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build one side's model in a worker; it passes the asked captions through the text tower and back."""
    inputs = torch.load(settings["inputs"])
    model = {"ours": our_model, "open_clip": open_clip_model}[settings["side"]](settings)
    model.load_state_dict(inputs["weights"])
    model.train()
    tokens = {name: t.to(settings["device"]) for name, t in inputs["tokens"].items()}
    generator = torch.Generator().manual_seed(0)
    rows = len(next(iter(tokens.values())))
    gradient = torch.randn(rows, settings["model"]["embed_dim"], generator=generator).to(settings["device"])

    def once(captions: Tensor) -> None:
        model.zero_grad()
        with autocast_of(settings):
            features = model.encode_text(captions, normalize=True)
        features.backward(gradient.to(features.dtype))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        def passes() -> None:
            for _ in range(request["passes"]):
                once(tokens[request["captions"]])

        return {"seconds": bench.timed(passes, device=settings["device"])}

    return answer


if __name__ == "__main__":
    main()
