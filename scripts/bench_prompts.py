"""Speed of the zero-shot classifier: class vectors from prompts, ours against clip-benchmark's `zero_shot_classifier`.

    python scripts/bench_prompts.py --peer-python PATH --json prompts.json
    python scripts/bench_prompts.py --peer-python PATH --model half --classes 10 --rounds 1
    python scripts/bench_prompts.py --device cuda --model ViT-B-32 --classes 1000 --peer-python PATH

PATH is a Python with clip-benchmark. Both sides tokenize, encode and average the 80 ImageNet prompts of the first
classes with the same weights in float32, on the same device, in turn; the vectors must be equal to 1e-4. Expected:
about the ratio of the context length to the mean length of the prompts, 77 to 10.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench
import torch
from bench_sides import open_clip_model, our_model

MAX_DIFFERENCE = 1e-4


def main() -> None:
    """Measure as the command line says."""
    if "--worker" in sys.argv:
        bench.serve(build)
        return
    options = parse()
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as folder:
        row = speed(options, prepare(options, Path(folder)))
    bench.print_table([{k: bench.shown_ratio(v) if k == "ratio" else v for k, v in row.items() if k != "seconds"}])
    bench.finish(options, started=started, rows=[row])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--model", default="ViT-B-32", help="a row of configs/model, or half: of ViT-B-32")
    parser.add_argument("--classes", type=int, default=50, help="classes of ImageNet (default 50)")
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the weights for both sides; return the settings."""
    from bench_inputs import model_config, model_shape

    from clip_train.evaluation.prompts.files import imagenet_classnames, load_templates

    config = model_config(options.model)
    torch.save(config.build(seed=0).state_dict(), folder / "weights.pt")
    return {
        "model": model_shape(config), "weights": str(folder / "weights.pt"), "seed": 0, "device": options.device,
        "threads": options.threads, "peer_block": "default", "classnames": imagenet_classnames()[: options.classes],
        "templates": load_templates("imagenet"),
    }  # fmt: skip


def speed(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what both sides took, their ratio, and how far their vectors are apart."""
    sides = {"ours": sys.executable}
    if has_clip_benchmark(options.peer_python):
        sides["clip_benchmark"] = options.peer_python
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(bench.Worker(__file__, python=python, settings=settings | {"side": name}))
            for name, python in sides.items()
        }
        # The first pass warms up and shows that both compute the same.
        vectors = {name: torch.tensor(worker.ask({"vectors": True})["vectors"]) for name, worker in workers.items()}
        difference = max(float((v - vectors["ours"]).abs().max()) for v in vectors.values())
        if difference > MAX_DIFFERENCE:
            raise SystemExit(f"the sides compute different class vectors: {difference:.1e}")
        seconds = bench.interleaved(
            {name: lambda worker=worker: worker.ask({"vectors": False})["seconds"] for name, worker in workers.items()},
            rounds=options.rounds,
        )
    row: dict[str, Any] = {"model": settings["model"]["name"], "prompts": 80 * len(settings["classnames"])}
    row |= {f"{name}_seconds": round(statistics.median(values), 3) for name, values in seconds.items()}
    if "clip_benchmark" in seconds:
        row |= {"ratio": bench.ratio(seconds["clip_benchmark"], seconds["ours"]), "max_difference": difference}
    return row | {"seconds": seconds}


def has_clip_benchmark(python: str) -> bool:
    """Return whether an interpreter can import clip-benchmark."""
    found = subprocess.run([python, "-c", "import clip_benchmark"], capture_output=True, check=False)
    return found.returncode == 0


def build(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build one side in a worker; it makes the classifier on demand."""
    classifier = {"ours": our_classifier, "clip_benchmark": their_classifier}[settings["side"]](settings)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["vectors"]:
            return {"vectors": classifier().tolist()}
        return {"seconds": bench.timed(classifier, device=settings["device"])}

    return answer


def our_classifier(settings: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return what makes our class vectors [C, D]."""
    from clip_train.distributed.world import World
    from clip_train.evaluation.features import evaluating
    from clip_train.evaluation.prompts import memo
    from clip_train.evaluation.prompts.classifier import build_classifier, tokenize_prompts
    from clip_train.tokenizer.bpe import ClipTokenizer

    memo.MOST_KEPT = 0  # every round encodes its prompts
    model, tokenizer = our_model(settings), ClipTokenizer()
    model.load_state_dict(torch.load(settings["weights"]))
    world = World(device=torch.device(settings["device"]))

    def make() -> torch.Tensor:
        with evaluating(model, world=world, precision="fp32"):
            prompts = tokenize_prompts(
                tokenizer, classnames=settings["classnames"], templates=settings["templates"]
            )  # fmt: skip
            classifier = build_classifier(model, prompts, world=world)
            return classifier.vectors[classifier.rows]

    return make


def their_classifier(settings: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return what makes clip-benchmark's class vectors [C, D], as its command line does with `--no_amp`."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification

    model = open_clip_model(settings)
    model.load_state_dict(torch.load(settings["weights"]))
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    templates = [template.replace("{}", "{c}") for template in settings["templates"]]

    def make() -> torch.Tensor:
        return zeroshot_classification.zero_shot_classifier(
            model, tokenizer, settings["classnames"], templates, settings["device"], amp=False
        ).T

    return make


if __name__ == "__main__":
    main()
