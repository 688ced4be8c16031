"""Temperature, ECE, Brier score and likelihood against float64 loops, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import torch

from clip_train.evaluation.calibrate.temperature import (
    MAX_TEMPERATURE,
    Answers,
    Questions,
    answer,
    fit_temperature,
    measure_reliability,
)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def questions(num_images=300, num_labels=7, *, noise=0.8, logit_scale=40.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = unit(rng.normal(size=(num_labels, 12)))
    right = rng.integers(num_labels, size=num_images)
    images = unit(labels[right] + noise * rng.normal(size=(num_images, 12)))
    tensors = (torch.from_numpy(x).float() for x in (images, labels))
    return Questions(*tensors, torch.from_numpy(right), logit_scale)


def probabilities(asked, temperature):
    logits = asked.logit_scale * asked.images.double().numpy() @ asked.labels.double().numpy().T / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def mean_nll(asked, temperature):
    return -np.log(probabilities(asked, temperature)[np.arange(len(asked.right)), asked.right.numpy()]).mean()


@pytest.mark.parametrize(("noise", "logit_scale"), [(0.8, 40.0), (0.3, 5.0), (2.0, 100.0)])
def test_the_temperature_is_where_the_likelihood_is_highest(noise, logit_scale):
    asked = questions(noise=noise, logit_scale=logit_scale)
    optimize = pytest.importorskip("scipy.optimize")
    best = optimize.minimize_scalar(lambda t: mean_nll(asked, math.exp(t)), bounds=(-4.6, 4.6), method="bounded",
                                    options={"xatol": 1e-9})  # fmt: skip
    assert fit_temperature(asked) == pytest.approx(math.exp(best.x), rel=1e-4)


def test_answers_drawn_from_the_probabilities_need_no_other_temperature():
    asked = questions(20_000, noise=1.5, logit_scale=6.0)
    p = probabilities(asked, 1.0)
    drawn = (p.cumsum(axis=1) < np.random.default_rng(1).random((len(p), 1))).sum(axis=1)
    asked = asked._replace(right=torch.from_numpy(drawn))
    assert fit_temperature(asked) == pytest.approx(1, abs=0.03)
    assert measure_reliability(answer(asked, temperature=1.0)).ece < 0.01
    assert fit_temperature(asked._replace(logit_scale=18.0)) == pytest.approx(3, abs=0.1)


def test_without_a_mistake_the_temperature_is_at_its_bound():
    assert fit_temperature(questions(noise=0.0)) == pytest.approx(1 / MAX_TEMPERATURE, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_answers_equal_scikit_learn_and_loops(temperature):
    reference = pytest.importorskip("sklearn.metrics")
    asked = questions(noise=1.2, logit_scale=20.0)
    p, right = probabilities(asked, temperature), asked.right.numpy()
    found = answer(asked, temperature=temperature)
    np.testing.assert_allclose(found.confidence, p.max(axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.correct, p.argmax(axis=1) == right)
    assert found.nll.mean() == pytest.approx(reference.log_loss(right, p, labels=range(7)), abs=1e-5)
    assert found.brier.mean() == pytest.approx(((p - np.eye(7)[right]) ** 2).sum(axis=1).mean(), abs=1e-5)
    measured = measure_reliability(found)
    assert measured.ece == pytest.approx(ece_by_loop(found.confidence, found.correct), abs=1e-12)
    assert measured.accuracy == found.correct.mean()


def ece_by_loop(confidence, correct):
    """As in the code of Guo et al. 2017: a bin is open below and closed above."""
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_bins_are_closed_above_and_empty_ones_have_no_value():
    confidence = np.array([1.0, 14 / 15, 14 / 15 + 1e-9, 0.2, 1e-12])
    measured = measure_reliability(
        Answers(confidence, np.array([True, False, True, False, True]), np.zeros(5), np.zeros(5))
    )
    assert measured.counts == [1, 0, 1] + [0] * 10 + [1, 2]
    assert measured.accuracies[13:] == [0.0, 1.0]
    assert measured.accuracies[1] is None
    assert measured.confidences[1] is None
    assert sum(measured.counts) == 5


def test_a_tie_goes_to_the_lower_label():
    asked = questions()._replace(labels=torch.ones(3, 12) / math.sqrt(12), right=torch.tensor([0, 1, 2] * 100))
    np.testing.assert_array_equal(answer(asked, temperature=1.0).correct, [True, False, False] * 100)


def test_pieces_change_nothing(monkeypatch):
    from clip_train.evaluation.calibrate import temperature

    asked = questions()
    expected = fit_temperature(asked), answer(asked, temperature=2.0)
    monkeypatch.setattr(temperature, "_CHUNK_ELEMENTS", 50)
    assert fit_temperature(asked) == pytest.approx(expected[0], rel=1e-5)
    for found, before in zip(answer(asked, temperature=2.0), expected[1], strict=True):
        np.testing.assert_allclose(found, before, atol=1e-6)
