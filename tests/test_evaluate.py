"""Evaluation during training: on the live weights, and on their moving average if the run keeps one."""

import json

import numpy as np
import pytest
import torch

from clip_train.config import load
from clip_train.distributed.parallel import is_sharded, parallelize, scattered, whole
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluate import run_evaluations
from clip_train.model.zoo import create_model
from clip_train.optim.ema import Ema
from tests.evaluation.classify.test_classify import make
from tests.evaluation.toys import random_pixels, toy_setting
from tests.gloo import run_on_ranks

IMAGES = 22
VOCABULARY = {"vocab_size": 1000}  # the toy tokenizer's
DECAY = 0.25


def step_(model):
    """Move every weight, as many training steps would; the same on every rank."""
    with torch.no_grad():
        for seed, (_, weight) in enumerate(sorted(model.state_dict().items())):
            noise = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.add_(scattered(noise, like=weight) if is_sharded(weight) else noise)


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


def test_the_best_checkpoint_may_be_the_averages_if_there_are_any():
    run = ["steps=9", "data.train=x", "optim.warmup=1", "evaluation=[val]", "data.val=y"]
    best = "checkpoint.best=val_ema/mean_recall@1"
    assert load("train", [*run, best, "optim.ema_decay=0.9"]).checkpoint.best == best.partition("=")[2]
    with pytest.raises(UserError, match=r"checkpoint\.best=val_ema/mean_recall@1 must be .* there are val/…$"):
        load("train", [*run, best])
    with pytest.raises(UserError, match=r"evaluation\.mine_ema: names that end in _ema"):
        load("train", [*run, "+evaluation@evaluation.mine_ema=retrieve", "evaluation.mine_ema.shards=x"])
