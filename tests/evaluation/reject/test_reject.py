"""The evaluator against scikit-learn on cosines that are computed one picture and one text at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clip_train.calibration import Rejection, RejectScore, hash_prompts, rejection_from_json
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluate import run_evaluations
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.reject.config import RejectConfig
from clip_train.evaluation.reject.evaluator import Reject
from clip_train.evaluation.result import two_halves
from tests.evaluation.toys import (
    ToyModel,
    ToySource,
    image_features_float64,
    random_pixels,
    text_feature_float64,
    toy_batches,
    toy_setting,
)

NAMES = ["cat", "dog", "red car", "green tree"]
TEMPLATES = ["a {}", "see the {}."]


class PixelSource(ToySource):
    """Knows its pixels, so that one reader serves several sets."""

    def __init__(self, pixels):
        super().__init__(len(pixels))
        self.pixels = pixels


def make(num_known, *, world=None, lexicon=("zebra", "Cat", "stone", "bread"), **reader):
    """A known set whose pictures lie near their class, and two foreign ones."""
    world = world or World()
    rng = np.random.default_rng(7)
    known = PixelSource(random_pixels(num_known))
    foreign = {"far": PixelSource(random_pixels(23, seed=5) // 3), "near": PixelSource(random_pixels(14, seed=6))}
    images = LabelledImages(
        source=known, labels=rng.integers(len(NAMES), size=num_known), classnames=NAMES, templates=TEMPLATES
    )
    setting = replace(
        toy_setting(known.pixels, world=world),
        read=lambda source: lambda: toy_batches(source.pixels, world=world, **{"batch_size": 4, **reader}),
    )
    return Reject(images, foreign=foreign, lexicon=lexicon, setting=setting, data="toys"), images, foreign


def cosines_float64(model, pixels):
    vectors = np.array([
        np.mean([text_feature_float64(model, t.replace("{}", n)) for t in TEMPLATES], axis=0) for n in NAMES
    ])  # fmt: skip
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return image_features_float64(model, pixels) @ vectors.T


def test_metrics_equal_scikit_learn_over_all_and_for_each_foreign_set():
    reference = pytest.importorskip("sklearn.metrics")
    evaluator, images, foreign = make(61)
    model = ToyModel()
    result = evaluator.evaluate(model)
    known = cosines_float64(model, images.source.pixels).max(axis=1)
    sets = {name: cosines_float64(model, source.pixels).max(axis=1) for name, source in foreign.items()}
    for part, scores in [(result, np.concatenate(list(sets.values()))), *((result.parts[n], sets[n]) for n in sets)]:
        truth, both = np.r_[np.ones(61), np.zeros(len(scores))], np.r_[known, scores]
        fpr, tpr, _ = reference.roc_curve(truth, both, drop_intermediate=False)
        assert part.num_items == len(both)
        assert part.metrics["auroc"] == pytest.approx(reference.roc_auc_score(truth, both))
        assert part.metrics["aupr"] == pytest.approx(reference.average_precision_score(truth, both))
        assert part.metrics["fpr_at_95_tpr"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
        assert part.chance["aupr"] == pytest.approx(61 / len(both))
        for name, (low, high) in part.intervals.items():
            assert low <= part.metrics[name] <= high


def test_every_score_is_in_the_predictions_and_its_figures_in_the_details():
    evaluator, images, _ = make(40)
    model = ToyModel()
    result = evaluator.evaluate(model)
    cosines = cosines_float64(model, images.source.pixels)
    np.testing.assert_allclose(result.predictions["known_max_cosine"], cosines.max(axis=1), atol=1e-5)
    logits = np.exp(float(model.logit_scale.exp()) * cosines)
    np.testing.assert_allclose(
        result.predictions["known_msp"], (logits / logits.sum(axis=1, keepdims=True)).max(axis=1), atol=1e-4
    )
    assert set(result.details["scores"]) == {score.value for score in RejectScore}
    assert set(result.details["scores"]["mcm"]) == {"all", "far", "near", "aurc"}
    wrong = cosines.argmax(axis=1) != images.labels
    curve = [wrong[np.argsort(-cosines.max(axis=1))[:k]].mean() for k in range(1, 41)]
    np.testing.assert_allclose(result.details["rejection"]["risks"], curve)
    assert result.details["scores"]["max_cosine"]["aurc"] == pytest.approx(np.mean(curve))


def test_thresholds_are_fitted_on_one_half_and_judged_on_the_other():
    evaluator, images, foreign = make(60)
    model = ToyModel()
    rejection = rejection_from_json(evaluator.evaluate(model).details["rejection"])
    assert isinstance(rejection, Rejection)
    known = cosines_float64(model, images.source.pixels).max(axis=1)
    fitted, tested = two_halves(60)
    assert sorted([*fitted, *tested]) == list(range(60))
    threshold = rejection.thresholds[RejectScore.max_cosine]
    assert threshold == pytest.approx(np.sort(known[fitted])[1], abs=1e-6)  # 29 of 30 are at least 95 %
    assert rejection.known_passing[RejectScore.max_cosine] == (known[tested] >= threshold - 1e-6).mean()
    for name, source in foreign.items():
        scores = cosines_float64(model, source.pixels).max(axis=1)
        assert rejection.foreign_passing[name][RejectScore.max_cosine] == (scores >= threshold - 1e-6).mean()
    assert rejection.prompts_sha256 == hash_prompts([t.replace("{}", n) for n in NAMES for t in TEMPLATES])
    assert rejection.templates == ["a {}", "see the {}."]
    assert rejection.num_foreign == {"far": 23, "near": 14}


def test_words_that_are_labels_are_no_negative_labels():
    evaluator, _, _ = make(10)
    assert evaluator._lexicon == ["zebra", "stone", "bread"]
    scores = make(10, lexicon=["CAT"])[0].evaluate(ToyModel()).details["scores"]
    assert "negative_labels" not in scores


def test_a_foreign_picture_that_is_left_out_is_an_error_and_not_a_score():
    evaluator, _, _ = make(30, leave_out=20)  # place 20 of 30 and of 23: the known set comes first
    with pytest.raises(IntegrityError, match="saw 29 images"):
        evaluator.evaluate(ToyModel())


def test_a_collapsed_model_gets_a_reason_and_no_score():
    model = ToyModel()
    model.text_weight = torch.ones_like(model.text_weight)
    result = make(20)[0].evaluate(model)
    assert "text features" in result.collapsed
    assert (result.metrics, result.parts, result.notes) == ({}, {}, [])


def test_a_model_that_collapses_in_training_does_not_end_the_run_when_its_answers_are_to_be_shown(tmp_path):
    model = ToyModel()
    model.text_weight = torch.ones_like(model.text_weight)
    arguments = {"out": tmp_path, "name": "toy", "weights": "run, step 2", "samples": True}
    assert run_evaluations({"toy": make(20)[0]}, model, ema=None, world=World(), **arguments) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.npz"]


def test_sets_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "a.png").write_bytes(b"")
    setting = toy_setting(random_pixels(1), world=World())
    cases = [
        ({}, "at least two classes"),
        ({"foreign": {"music": "generated"}}, "only blank, noise, text, shapes can be generated"),
        ({"foreign": {"known": str(tmp_path)}}, "call the set something else"),
        ({"foreign": {"x": str(tmp_path / "none")}}, "none"),
        ({"foreign": {"x": str(tmp_path / "none" / "*.tar")}}, "not found"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            RejectConfig(root=str(tmp_path / "classes"), **options).open(setting)


def test_what_is_missing_is_named(tmp_path):
    assert RejectConfig(root=str(tmp_path)).missing() is None
    assert RejectConfig(root="/not/there").missing() == "/not/there"
    foreign = {"noise": "generated", "x": "/nor/this"}
    assert RejectConfig(root=str(tmp_path), foreign=foreign).missing() == "/nor/this"
    assert "x.tar" in RejectConfig(root=str(tmp_path), foreign={"x": "/nor/x.tar"}).missing()
