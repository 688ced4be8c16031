"""Zero-shot classification against a float64 recomputation, image by image and prompt by prompt."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.errors import IntegrityError
from clip_train.evaluation.classify.evaluator import Classify
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.classify.scores import score
from tests.evaluation.toys import (
    ToyModel,
    ToySource,
    image_features_float64,
    random_pixels,
    text_feature_float64,
    toy_batches,
    toy_setting,
)

NAMES = ["missile", "corgi", "red fox", "sunglasses", "a", "missile", "gown"]
TEMPLATES = ["a photo of a {}.", "{c}", "art of the {}, in oil"]


def make(num_images, *, world=None, names=NAMES, batch_size=4, **reader):
    pixels = random_pixels(num_images)
    labels = np.random.default_rng(2).integers(0, len(names), num_images)
    world = world or World()
    images = LabelledImages(source=ToySource(num_images), labels=labels, classnames=names, templates=TEMPLATES)
    setting = toy_setting(pixels, world=world, batch_size=batch_size, **reader)
    return Classify(images, setting=setting), pixels, labels


def make_several(num_images, *, world=None):
    """The same pictures, each with any number of the classes."""
    evaluator, pixels, _ = make(num_images, world=world)
    labels = np.random.default_rng(4).random((num_images, len(NAMES))) < 0.3
    evaluator.images = replace(evaluator.images, labels=labels)
    return evaluator, pixels, labels


def oracle(model, pixels, labels, names):
    """Return acc1, acc5, mean per-class recall and F1 by loops in float64; ties go to the lower class."""
    vectors = []
    for name in names:
        prompts = [t.replace("{c}", name).replace("{}", name) for t in TEMPLATES]
        mean = np.mean([text_feature_float64(model, prompt) for prompt in prompts], axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    hit1, hit5, first = [], [], []
    for feature, label in zip(image_features_float64(model, pixels), labels, strict=True):
        ranking = sorted(range(len(names)), key=lambda c: (-float(feature @ vectors[c]), c))
        hit1.append(ranking[0] == label)
        hit5.append(label in ranking[:5])
        first.append(ranking[0])
    recalls = [np.mean([h for h, y in zip(hit1, labels, strict=True) if y == c]) for c in np.unique(labels)]
    f1 = []
    for c in np.unique(labels):
        right = sum(p == y == c for p, y in zip(first, labels, strict=True))
        precision, recall = right / max(first.count(c), 1), right / sum(labels == c)
        f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    scores = {"acc1": np.mean(hit1), "acc5": np.mean(hit5), "mean_per_class_recall": np.mean(recalls)}
    return {**scores, "f1_macro": np.mean(f1)}


@pytest.mark.parametrize("num_images", [1, 4, 37])
def test_scores_equal_the_float64_oracle(num_images):
    evaluator, pixels, labels = make(num_images)
    model = ToyModel()
    assert evaluator.evaluate(model).metrics == pytest.approx(oracle(model, pixels, labels, NAMES), abs=1e-12)


@pytest.mark.parametrize(("precision", "used"), [("auto", "fp32"), ("bf16", "bf16")])
def test_the_result_says_with_which_precision_and_prompts_it_was_found(precision, used):
    evaluator, _, _ = make(4)
    evaluator.setting = replace(evaluator.setting, precision=precision)
    found = evaluator.evaluate(ToyModel()).details
    prompts = "\n".join(t.replace("{c}", name).replace("{}", name) for name in NAMES for t in TEMPLATES)
    assert (found["precision"], found["prompts_sha256"]) == (used, hashlib.sha256(prompts.encode()).hexdigest())


def test_a_reader_that_skips_an_image_is_an_error_and_not_a_score():
    evaluator, _, _ = make(10, leave_out=3)
    with pytest.raises(IntegrityError, match=r"saw 9 images .* of a set of 10"):
        evaluator.evaluate(ToyModel())


def test_a_reader_that_repeats_an_image_is_an_error_and_not_a_score():
    evaluator, pixels, _ = make(10)
    twice = [*toy_batches(pixels, world=World(), batch_size=5), *toy_batches(pixels[:1], world=World(), batch_size=5)]
    evaluator.setting = replace(evaluator.setting, read=lambda source: lambda: twice)
    with pytest.raises(IntegrityError, match=r"saw 11 images \(10 different\)"):
        evaluator.evaluate(ToyModel())


def test_classes_with_one_name_tie_and_the_lower_class_wins():
    result = make(60)[0].evaluate(ToyModel())
    top, cosine = result.predictions["top"], result.predictions["cosine"]
    for classes, cosines in zip(top, cosine, strict=True):
        places = {int(c): i for i, c in enumerate(classes)}
        if 5 in places:
            assert places[0] == places[5] - 1
            assert cosines[places[0]] == cosines[places[5]]
    assert not (top[:, 0] == 5).any()


def test_below_five_classes_there_is_no_acc5():
    metrics = make(20, names=NAMES[:4])[0].evaluate(ToyModel()).metrics
    assert metrics.keys() == {"acc1", "mean_per_class_recall", "f1_macro"}


def test_scores_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    evaluator, pixels, labels = make(200)
    model = ToyModel()
    ours = evaluator.evaluate(model).metrics
    features = image_features_float64(model, pixels)
    vectors = np.array(
        [
            np.mean([text_feature_float64(model, t.replace("{c}", n).replace("{}", n)) for t in TEMPLATES], axis=0)
            for n in NAMES
        ]
    )
    cosines = features @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    # scikit-learn breaks ties its own way; a hair's breadth decides them as we do.
    cosines -= 1e-9 * np.arange(len(NAMES))
    classes = np.arange(len(NAMES))
    assert ours["acc1"] == pytest.approx(metrics.top_k_accuracy_score(labels, cosines, k=1, labels=classes))
    assert ours["acc5"] == pytest.approx(metrics.top_k_accuracy_score(labels, cosines, k=5, labels=classes))
    predicted = cosines.argmax(axis=1)
    assert ours["mean_per_class_recall"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    wilds = metrics.f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert ours["f1_macro"] == pytest.approx(wilds)


def test_classes_without_images_do_not_count_in_the_mean_recall():
    labels = np.array([0, 0, 2])
    top = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [2, 0, 1, 3, 4]])
    result = score(labels, top, num_classes=6)
    f1 = pytest.approx((2 / 3 + 1) / 2)
    assert result.metrics == {"acc1": 2 / 3, "acc5": 1.0, "mean_per_class_recall": (0.5 + 1) / 2, "f1_macro": f1}
    # A guesser finds a sixth of each class, and is right in 2/3 or 1/3 of the answers.
    guessed = pytest.approx((2 / (6 + 1 / (2 / 3)) + 2 / (6 + 1 / (1 / 3))) / 2)
    assert result.chance == {"acc1": 1 / 6, "acc5": 5 / 6, "mean_per_class_recall": 1 / 6, "f1_macro": guessed}
    assert any("4 of 6 classes have no image" in warning for warning in result.warnings)


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was():
    model = ToyModel().train()
    make(8)[0].evaluate(model)
    assert model.training
    assert set(model.seen_modes) == {False}


def test_a_collapsed_image_tower_gets_a_reason_and_no_score():
    model = ToyModel()
    model.image_weight = torch.zeros_like(model.image_weight)
    model.image_weight[:, 0] = 1e-9  # brightness alone decides, and only the sign of it
    evaluator, pixels, _ = make(20)
    pixels[:] = pixels // 2 + 128
    result = evaluator.evaluate(model)
    assert result.metrics == result.intervals == {} and result.per_class == []
    assert result.details == {"precision": "fp32"}
    assert "image features" in result.collapsed


def test_all_images_in_one_class_is_a_warning():
    top = np.tile([3, 0, 1, 2, 4], (6, 1))
    result = score(np.arange(6) % 5, top, num_classes=5)
    assert "every image is put in class 3" in result.warnings
