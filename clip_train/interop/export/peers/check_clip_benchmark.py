"""Scores by clip-benchmark's own command line, from the exported folder, on the labelled pictures beside the inputs."""

import sys

from clip_benchmark.cli import main
from peer_io import FOLDER, WORK

sys.argv = [
    "clip_benchmark", "eval", "--model_type", "open_clip", "--model", f"local-dir:{FOLDER}", "--pretrained", "",
    "--dataset", "wds/scenes", "--dataset_root", str(WORK / "classes"), "--task", "zeroshot_classification",
    "--num_workers", "0", "--no_amp", "--quiet", "--output", str(WORK / "benchmark.json"),
]  # fmt: skip
main()
