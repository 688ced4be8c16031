"""The command that chooses prompt templates: its file is what evaluation takes, and its numbers are evaluation's."""

import json

import numpy as np
import pytest
from PIL import Image

from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.draw import held_out
from clip_train.evaluation.prompts.files import load_templates
from clip_train.tools.prompts import prompts_command
from tests.interop import files
from tests.interop.test_load import write_run

CHOICES = {"split": "test", "templates": "simple", "classnames": "auto", "most": 3, "name": None, "out": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "mine"
    model = files.small_model(seed=1)
    for i, weight in enumerate(model.parameters()):  # far from its initial values, whose features are all alike
        generator = files.torch.Generator().manual_seed(i)
        weight.data.add_(0.3 * files.torch.randn(weight.shape, generator=generator))
    write_run(path, model)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pets")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "red fox"):
        (folder / name).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_the_chosen_templates_are_written_into_the_run_and_score_there_as_told(run, pictures):
    lines = prompts_command(str(run), pictures, **CHOICES)
    path = run / "prompts" / f"{pictures.name}.txt"
    assert str(path) in lines[-1]
    chosen, report = load_templates(str(path)), json.loads(path.with_suffix(".json").read_text())
    assert chosen == report["chosen"]["templates"] and set(chosen) <= set(load_templates("simple"))
    import clip_train

    model, _ = clip_train.load(run, device="cpu")
    evaluator = ClassifyConfig(root=str(pictures), templates=str(path)).build(
        world=World(), tokenizer=model.tokenize, image_size=model.config.vision.image_size
    )
    predictions = evaluator.evaluate(model).predictions
    right = predictions["top"][:, 0] == predictions["label"]
    judged = held_out(predictions["label"], share=0.5)
    assert judged.sum() == report["num_held_out"] == 12
    assert right[judged].mean() == pytest.approx(report["chosen"]["held_out"])
    assert right[~judged].mean() == pytest.approx(report["chosen"]["chosen_on"])


def test_a_model_that_is_no_run_needs_a_place_for_the_file(pictures):
    with pytest.raises(UserError, match="--out FILE"):
        prompts_command("ViT-B/32", pictures, **CHOICES)
    with pytest.raises(UserError, match="--most=0"):
        prompts_command("x", pictures, **{**CHOICES, "most": 0, "out": pictures / "x.txt"})
    with pytest.raises(UserError, match="is a folder: name a file in it"):  # before anything is computed
        prompts_command("x", pictures, **{**CHOICES, "out": pictures})
    with pytest.raises(UserError, match=r"x\.txt cannot be written: File exists"):
        prompts_command("x", pictures, **{**CHOICES, "out": pictures / "cat" / "0.png" / "x.txt"})
