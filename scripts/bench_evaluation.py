"""Speed of an evaluation on several ranks against one, on the same set and model.

    python scripts/bench_evaluation.py --ranks 2 --json ranks.json
    python scripts/bench_evaluation.py --ranks 2 --pictures 40 --rounds 1

Every rank has one thread and a core of its own, so that two ranks have twice the means of one. Measured is what the
result says: building the classifier, reading and encoding the pictures, not the start of the processes. The first
answers must be equal, but for near ties. Expected: nearly the number of ranks, where there are as many idle cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import numpy as np

MIN_EQUAL = 0.99


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to compare with one (default 2)")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of the set (default 1000)")
    parser.add_argument("--model", default="half", help="a row of configs/model, or half: of ViT-B-32 (default half)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, environment and all numbers")
    options = parser.parse_args()
    options.threads, options.device, options.peer_python = 1, "cpu", sys.executable
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, model=options.model, num_pictures=options.pictures)
        answers: dict[int, np.ndarray] = {}

        def side(ranks: int) -> float:
            result = evaluate(folder, ranks=ranks)
            answers[ranks] = np.load(folder / "out" / "classify.npz")["top"][:, 0]
            return result["clip_train"]["seconds"]

        seconds = bench.interleaved(
            {"1": lambda: side(1), f"{options.ranks}": lambda: side(options.ranks)}, rounds=options.rounds
        )
    equal = float((answers[1] == answers[options.ranks]).mean())
    if equal < MIN_EQUAL:
        raise SystemExit(f"only {100 * equal:.1f} % of the answers are equal")
    one, many = seconds["1"], seconds[f"{options.ranks}"]
    row = {
        "ranks": options.ranks, "pictures": options.pictures, "seconds_of_1": round(statistics.median(one), 2),
        "seconds": round(statistics.median(many), 2), "speedup": bench.ratio(one, many),
    }  # fmt: skip
    bench.print_table([row | {"speedup": bench.shown_ratio(row["speedup"])}])
    bench.finish(options, started=started, rows=[row | {"rounds": seconds}])


def write_inputs(folder: Path, *, model: str, num_pictures: int) -> None:
    """Write a model with random weights as an export, and generated pictures of 100 classes."""
    from bench_inputs import model_config

    from clip_train.data.scenes.pictures import labelled_scene
    from clip_train.data.scenes.write import write_classes
    from clip_train.interop.export.folder import write_open_clip
    from clip_train.tokenizer.bpe import ClipTokenizer

    config = model_config(model)
    (folder / "model").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in config.build(seed=0).state_dict().items()}
    write_open_clip(
        folder / "model", config=config, tensors=tensors, tokenizer=ClipTokenizer(), published_as="benchmark"
    )
    write_classes(folder / "set", (labelled_scene(i, seed=0, image_size=256) for i in range(num_pictures)))


def evaluate(folder: Path, *, ranks: int) -> dict[str, Any]:
    """Run the command with so many processes, and return its result."""
    from clip_train.evaluation.result import read_result

    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "-m", "clip_train", "evaluate", f"checkpoint={folder / 'model'}", f"output={folder / 'out'}", "device=cpu",
            "evaluation=[classify]", f"evaluation.classify.root={folder / 'set'}", "evaluation.classify.batch_size=32",
        ],
        check=True, stdout=subprocess.DEVNULL, cwd=bench.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return read_result(folder / "out" / "classify.json")


if __name__ == "__main__":
    main()
