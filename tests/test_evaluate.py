"""Evaluation during training: on the live weights, and on their moving average if the run keeps one."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import clip_train
from clip_train.calibration import CALIBRATION_FILE, read_calibration
from clip_train.config import load
from clip_train.data.scenes.foreign import Foreign, draw_foreign
from clip_train.data.scenes.write import write_scenes
from clip_train.distributed.parallel import parallelize
from clip_train.distributed.shards import fill, whole
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluate import evaluate, keep_calibration, keep_calibration_of_training, run_evaluations
from clip_train.evaluation.result import EvaluationResult, two_halves, write_result
from clip_train.model.zoo import create_model
from clip_train.optim.ema import Ema
from tests.evaluation.classify.test_classify import make
from tests.evaluation.toys import random_pixels, toy_setting
from tests.gloo import run_on_ranks
from tests.interop import files
from tests.interop.test_load import write_run
from tests.test_calibration import REJECTION, TEMPERATURE
from tests.test_train import overrides, start

IMAGES = 22
VOCABULARY = {"vocab_size": 1000}  # the toy tokenizer's
FEW_WORDS = {"width": 64, "heads": 1, "layers": 1, **VOCABULARY}
DECAY = 0.25


def step_(model):
    """Move every weight, as many training steps would; the same on every rank."""
    with torch.no_grad():
        for seed, (_, weight) in enumerate(sorted(model.state_dict().items())):
            noise = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            fill(weight, whole(weight) + noise)


def toy_evaluator(world):
    """The toy set of the classification tests, in pictures of the tiny model's size."""
    evaluator, _, _ = make(IMAGES, world=world)
    pixels = random_pixels(IMAGES, size=64)
    evaluator.setting = toy_setting(pixels, world=world, batch_size=4)
    return evaluator


def evaluate_both(world, folder, strategy):
    """Return the scores of both weights from a run's point of view."""
    model = create_model("tiny", seed=1, text=VOCABULARY)
    parallelize(model, world=world, strategy=strategy)
    ema = Ema(model, decay=DECAY)
    step_(model)
    ema.update()
    before = {name: whole(value).clone() for name, value in model.state_dict().items()}
    scores = run_evaluations(
        {"toy": toy_evaluator(world)}, model, ema=ema, world=world, out=folder, name="tiny", weights="run, step 3",
        samples=False,
    )  # fmt: skip
    after = {name: whole(value) for name, value in model.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before), "the live weights are not back"
    return scores


def expected(folder):
    """Return the scores of two plain models that hold the weights and, by hand, their average."""
    live, average = (create_model("tiny", seed=1, text=VOCABULARY) for _ in range(2))
    step_(live)
    with torch.no_grad():
        for name, value in average.state_dict().items():
            value.copy_(DECAY * value + (1 - DECAY) * live.state_dict()[name])
    scores = {}
    for name, model in (("toy", live), ("toy_ema", average)):
        result = toy_evaluator(World()).evaluate(model)
        np.savez(folder / f"{name}.expected.npz", **result.predictions)
        scores |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
    return scores


def assert_equal_results(folder, got, want):
    assert got == want and {"toy/acc1", "toy_ema/acc1"} <= got.keys()
    for name in ("toy", "toy_ema"):
        with np.load(folder / f"{name}.npz") as mine, np.load(folder / f"{name}.expected.npz") as theirs:
            np.testing.assert_allclose(mine["cosine"], theirs["cosine"], atol=2e-6)
    with np.load(folder / "toy.npz") as raw, np.load(folder / "toy_ema.npz") as average:
        assert abs(raw["cosine"] - average["cosine"]).max() > 1e-3  # two sets of weights, or nothing is tested


def test_both_weights_are_scored_and_written_apart(tmp_path):
    assert_equal_results(tmp_path, evaluate_both(World(), tmp_path, "ddp"), expected(tmp_path))
    of = {name: json.loads((tmp_path / f"{name}.json").read_text())["pretrained"] for name in ("toy", "toy_ema")}
    assert of == {"toy": "run, step 3", "toy_ema": "run, step 3, moving average"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_score_both_weights_as_one_does(strategy, tmp_path):
    want = expected(tmp_path)
    for got in run_on_ranks(evaluate_both, tmp_path, strategy):
        assert_equal_results(tmp_path, got, want)


@pytest.mark.slow
def test_two_ranks_of_a_resnet_evaluate_what_they_save(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=60, num_val=20, seed=0)
    more = ["model=tiny-rn", "steps=6", "evaluation=[val]", f"data.val={tmp_path}/scenes/val", "optim.ema_decay=0.5"]
    two = start(overrides(tmp_path / "scenes", tmp_path / "run", *more), processes=2)
    _, said = two.communicate(timeout=300)
    assert two.returncode == 0, said
    evaluate(load("evaluate", [f"checkpoint={tmp_path}/run", "device=cpu", f"output={tmp_path}/again"]))
    during = tmp_path / "run" / "evaluation" / "step-00000006"
    with np.load(during / "val_ema.npz") as ranks, np.load(tmp_path / "again" / "val.npz") as one:
        np.testing.assert_allclose(ranks["pair_cosine"], one["pair_cosine"], atol=1e-5)


def test_the_best_checkpoint_may_be_the_averages_if_there_are_any():
    run = ["steps=9", "data.train=x", "optim.warmup=1", "evaluation=[val]", "data.val=y"]
    best = "checkpoint.best=val_ema/mean_recall@1"
    assert load("train", [*run, best, "optim.ema_decay=0.9"]).checkpoint.best == best.partition("=")[2]
    with pytest.raises(UserError, match=r"checkpoint\.best=val_ema/mean_recall@1 must be .* there are val/…$"):
        load("train", [*run, best])
    with pytest.raises(UserError, match=r"evaluation\.mine_ema: names that end in _ema"):
        load("train", [*run, "+evaluation@evaluation.mine_ema=retrieve", "evaluation.mine_ema.shards=x"])


def confident_result(folder, name, **parts):
    result = EvaluationResult(
        task="calibration", num_items=8, metrics={"x": 0.5}, chance={}, intervals={},
        details={key: asdict(part) for key, part in parts.items()},
    )  # fmt: skip
    write_result(result, folder / f"{name}.json", dataset=name, model="m")


@pytest.mark.parametrize("averaged", [False, True])
def test_after_training_the_calibration_of_what_load_loads_is_kept_with_the_run(tmp_path, averaged):
    live, average = (files.small_model(seed=seed, text=FEW_WORDS) for seed in (1, 2))
    write_run(tmp_path, live, ema=average if averaged else None)
    folder = tmp_path / "evaluation" / "step-00000005"
    confident_result(folder, "calibrate", temperature=TEMPERATURE)
    confident_result(folder, "calibrate_ema", temperature=replace(TEMPERATURE, value=3.0))
    confident_result(folder, "reject", rejection=REJECTION)
    confident_result(folder, "val")
    keep_calibration_of_training(tmp_path, names=["val", "calibrate", "reject"])
    loaded, _ = clip_train.load(tmp_path, device="cpu")
    kept = read_calibration(tmp_path / CALIBRATION_FILE)
    assert loaded.calibration == kept
    assert kept.temperature.value == (3.0 if averaged else 1.5)
    assert kept.rejection == (None if averaged else REJECTION)  # there is no reject_ema
    assert kept.model == f"{tmp_path.name}, step 5"


def test_a_run_without_such_evaluations_gets_no_calibration(tmp_path):
    write_run(tmp_path, files.small_model(text=FEW_WORDS))
    confident_result(tmp_path / "evaluation" / "step-00000005", "val")
    keep_calibration_of_training(tmp_path, names=["val", "calibrate"])
    keep_calibration_of_training(tmp_path / "none", names=["val"])
    assert not (tmp_path / CALIBRATION_FILE).exists()


def test_what_is_evaluated_later_is_added_and_that_of_other_weights_forgotten(tmp_path, capsys):
    write_run(tmp_path, files.small_model(seed=1, text=FEW_WORDS))
    confident_result(tmp_path, "calibrate", temperature=TEMPERATURE)
    confident_result(tmp_path, "reject", rejection=REJECTION)

    def keep(name):
        model, _ = clip_train.load(tmp_path, device="cpu")
        keep_calibration([tmp_path / f"{name}.json"], model=model, folder=tmp_path, name="m")
        return read_calibration(tmp_path / CALIBRATION_FILE)

    assert keep("calibrate").rejection is None
    both = keep("reject")
    assert (both.temperature, both.rejection) == (TEMPERATURE, REJECTION)
    confident_result(tmp_path, "many", temperature=replace(TEMPERATURE, num_fitted=400))
    confident_result(tmp_path, "few", temperature=replace(TEMPERATURE, value=100.0, num_fitted=2))
    assert keep("few").temperature.value == 100  # better than none, and than another of so few
    assert keep("many") == keep("few")
    assert "rests on 2 pictures of scenes only, and the former one on 400" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints")
    write_run(tmp_path, files.small_model(seed=2, text=FEW_WORDS))
    assert keep("reject").temperature is None


def test_a_set_that_is_not_there_is_told_with_the_name_of_its_evaluation(tmp_path):
    files.write_open_clip_folder(files.small_model(), tmp_path / "model")
    given = [f"checkpoint={tmp_path}/model", "device=cpu", f"output={tmp_path}"]
    with pytest.raises(UserError, match=r"^evaluation\.classify: root=/absent is not a folder"):
        evaluate(load("evaluate", [*given, "evaluation=[classify]", "evaluation.classify.root=/absent"]))
    with pytest.raises(UserError, match=rf"name evaluations, as in .*; {tmp_path}/model has none$"):
        evaluate(load("evaluate", given))


@pytest.mark.slow
def test_the_commands_measure_a_threshold_and_answer_unknown_below_it(tmp_path):
    model = files.small_model()
    step_(model)  # fresh weights map all pictures to nearly one point
    write_run(tmp_path / "run", model)
    shutil.copy(tmp_path / "run" / "checkpoints" / "step-00000005" / "config.yaml", tmp_path / "run")
    write_scenes(tmp_path / "scenes", num_train=1, num_val=1, seed=0)
    draw_foreign(Foreign.noise, 0, seed=9, image_size=64).save(tmp_path / "noise.png")

    def clip_train_(*words):
        command = [sys.executable, "-m", "clip_train", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    classes = f"{tmp_path}/scenes/classes"
    printed = clip_train_(
        "evaluate", "checkpoint=run", "evaluation=[scenes_reject,scenes_calibrate]", "device=cpu",
        f"evaluation.scenes_reject.root={classes}", f"evaluation.scenes_calibrate.root={classes}",
    )  # fmt: skip
    details = json.loads((tmp_path / "run" / "evaluation" / "scenes_reject.json").read_text())["clip_train"]
    assert (details["step"], details["weights"]) == (5, "raw")
    assert printed.endswith("report: run/report.html\n")
    assert "scenes_reject, evaluated later" in (tmp_path / "run" / "report.html").read_text()
    assert "scenes_reject: threshold max_cosine" in printed
    assert "scenes_calibrate: temperature" in printed
    kept = read_calibration(tmp_path / "run" / CALIBRATION_FILE)
    found = np.load(tmp_path / "run" / "evaluation" / "scenes_reject.npz")
    threshold = kept.rejection.thresholds["max_cosine"]
    assert (found["known_max_cosine"][two_halves(800)[0]] >= threshold).mean() == pytest.approx(0.95)
    answers = clip_train_("classify", "noise.png", "--model", "run", "--labels", "red circle,blue ring", "--json")
    row = json.loads(answers)
    cosine = row["labels"][0]["cosine"]
    assert (row["answer"] == "unknown") == (cosine < threshold)
    stricter = clip_train_("classify", "noise.png", "--model", "run", "--labels", "red circle", "--json",
                           "--min-similarity", "1")  # fmt: skip
    assert json.loads(stricter)["answer"] == "unknown"
