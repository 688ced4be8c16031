"""clip-benchmark's own SugarCrepe accuracy of an export, where a Python that has it is named."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import clip_train
from clip_train.data.scenes.pictures import training_pair
from clip_train.distributed.world import World
from clip_train.evaluation.choose.config import ChooseConfig
from clip_train.tools.export import export_command
from tests.interop import files

PYTHONS = [Path(path) for path in os.environ.get("CLIP_TRAIN_VERIFY_PYTHONS", "").split(":") if path]
FILES = ("add_att", "swap_att", "swap_obj")


def write_sugarcrepe(folder, *, num_items):
    """Generated pictures; the false caption is another picture's. Several items show one picture."""
    (folder / "val2017").mkdir(parents=True)
    pairs = [training_pair(i, seed=5, image_size=40) for i in range(num_items)]
    for i, pair in enumerate(pairs):
        (folder / "val2017" / f"{i:012d}.png").write_bytes(pair.png)
    rng = np.random.default_rng(0)
    for name in FILES:
        rows = {}
        for number in np.sort(rng.choice(10 * num_items, num_items, replace=False)):
            picture = int(rng.integers(num_items))
            other = rng.choice([i for i in range(num_items) if pairs[i].caption != pairs[picture].caption])
            rows[str(number)] = {
                "filename": f"{picture:012d}.png",
                "caption": pairs[picture].caption,
                "negative_caption": pairs[other].caption,
            }
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def accuracy_by_clip_benchmark(python, *, export, data, name, out):
    command = [
        str(python), "-m", "clip_benchmark.cli", "eval", "--model_type", "open_clip", "--model", f"local-dir:{export}",
        "--pretrained", "", "--no_amp", "--batch_size", "16", "--num_workers", "0", "--dataset", f"sugar_crepe/{name}",
        "--dataset_root", str(data), "--output", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sugarcrepe_accuracy_is_that_of_clip_benchmark(seed, tmp_path):
    tried = [(p, subprocess.run([p, "-c", "import clip_benchmark"], capture_output=True, check=False)) for p in PYTHONS]
    python = next((p for p, done in tried if not done.returncode), None) or pytest.skip(
        "no Python in CLIP_TRAIN_VERIFY_PYTHONS has clip-benchmark"
    )
    given = os.environ.get("CLIP_TRAIN_VERIFY_RUN")  # a trained model; without one, random weights
    source = given or files.write_open_clip_folder(files.small_model(seed=seed), tmp_path / "mine")
    assert not export_command(
        str(source), to="folder", out=tmp_path / "export", weights="auto", drop_logit_bias=False,
        int8=False, prove=False, pythons=[], repository=None,
    )  # fmt: skip
    data = write_sugarcrepe(tmp_path / "data", num_items=97)
    model, _ = clip_train.load(tmp_path / "export", device="cpu")
    evaluator = ChooseConfig(path=str(data)).build(
        world=World(), tokenizer=model.tokenize, image_size=model.config.vision.image_size
    )
    right = evaluator.evaluate(model).predictions["text_acc"]  # random weights count as collapsed and get no score
    for name in FILES:
        ours = right[[name in item.tags for item in evaluator.choices.items]]
        assert len(ours) == 97
        theirs = accuracy_by_clip_benchmark(
            python, export=tmp_path / "export", data=data, name=name, out=tmp_path / f"{name}.json"
        )
        assert theirs["text_acc"] == pytest.approx(ours.mean(), abs=1e-6)
        assert theirs["image_acc"] == 1.0  # says nothing: each item has one picture
        print(f"{name}: ours {ours.mean():.6f}, clip-benchmark {theirs['text_acc']:.6f}")
