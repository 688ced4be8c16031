"""ImageNet during training on two ranks, on raw and averaged weights: the numbers of one process afterwards."""

import json

import numpy as np
import pytest
import torch

import clip_train
from clip_train.data.scenes.write import write_scenes
from clip_train.distributed.world import World
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.prompts.files import imagenet_wnids
from tests.evaluation.test_sets import png
from tests.test_train import overrides, start

EVERY = 3
CLASSES = 30  # 2,400 prompts: enough for the classifier to be kept, which must not outlive its weights


@pytest.mark.slow
def test_two_ranks_score_exactly_n_pictures_with_both_weights_when_they_are_due(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=60, num_val=4, seed=0)
    for i, wnid in enumerate(imagenet_wnids()[:CLASSES]):
        folder = tmp_path / "imagenet" / "val" / wnid
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(png(i))
    evaluation = {"root": tmp_path / "imagenet", "every": EVERY, "workers": 0, "batch_size": 8}
    arguments = [f"evaluation.imagenet.{key}={value}" for key, value in evaluation.items()]
    arguments = ["evaluation=[imagenet]", *arguments, "steps=6", "optim.warmup=1", "optim.ema_decay=0.5"]
    process = start(overrides(tmp_path / "scenes", tmp_path / "run", *arguments), processes=2)
    _, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, complaints
    for step in (EVERY, 2 * EVERY):
        folder = tmp_path / "run" / "evaluation" / f"step-{step:08d}"
        assert json.loads((folder / "imagenet.json").read_text())["clip_train"]["n"] == CLASSES
    cosines = {}
    for name, weights in (("imagenet", "raw"), ("imagenet_ema", "ema")):
        model, _ = clip_train.load(tmp_path / "run", weights=weights, device="cpu")
        config = ClassifyConfig(root=str(tmp_path / "imagenet"), split="val", classnames="imagenet", batch_size=30)
        result = config.build(
            world=World(device=torch.device("cpu")), tokenizer=model.tokenize, image_size=model.config.vision.image_size
        ).evaluate(model)  # fmt: skip
        with np.load(folder / f"{name}.npz") as written:
            np.testing.assert_allclose(result.predictions["cosine"], written["cosine"], atol=1e-5)
            cosines[name] = written["cosine"]
    assert np.abs(cosines["imagenet"] - cosines["imagenet_ema"]).max() > 1e-4
