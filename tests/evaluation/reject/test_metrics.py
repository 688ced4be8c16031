"""Separation and selective prediction against scikit-learn, and against all orders of ties by brute force."""

from itertools import permutations

import numpy as np
import pytest

from clip_train.evaluation.reject import metrics
from clip_train.evaluation.reject.metrics import (
    aupr,
    aurc,
    auroc,
    fpr_at_95_tpr,
    intervals,
    risk_coverage,
    threshold_at_95_tpr,
)

reference = pytest.importorskip("sklearn.metrics")

CASES = {
    "no ties": (137, 61, None),
    "a few ties": (137, 61, 2),
    "almost all tied": (40, 300, 0),
    "exactly 95 %": (20, 20, 1),
    "one of each": (1, 1, 1),
}


def scores_of(case, seed=0):
    num_known, num_foreign, decimals = CASES[case]
    rng = np.random.default_rng(seed)
    known, foreign = rng.normal(0.3, 1, num_known), rng.normal(0, 1, num_foreign)
    return (known, foreign) if decimals is None else (known.round(decimals), foreign.round(decimals))


@pytest.mark.parametrize("case", CASES)
def test_separation_equals_scikit_learn_with_ties(case):
    known, foreign = scores_of(case)
    truth = np.r_[np.ones(len(known)), np.zeros(len(foreign))]
    scores = np.r_[known, foreign]
    fpr, tpr, _ = reference.roc_curve(truth, scores, drop_intermediate=False)
    assert auroc(known, foreign) == pytest.approx(reference.roc_auc_score(truth, scores), abs=1e-12)
    assert aupr(known, foreign) == pytest.approx(reference.average_precision_score(truth, scores), abs=1e-12)
    assert fpr_at_95_tpr(known, foreign) == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_threshold_is_the_highest_that_95_percent_of_the_known_reach(case):
    known, foreign = scores_of(case)
    threshold = threshold_at_95_tpr(known)
    higher = [t for t in known if t > threshold]
    assert (known >= threshold).mean() >= 0.95 - 1e-12
    assert all((known >= t).mean() < 0.95 - 1e-12 for t in higher)
    assert (foreign >= threshold).mean() == pytest.approx(fpr_at_95_tpr(known, foreign), abs=1e-12)


def test_a_cut_through_equal_scores_is_the_mean_over_their_orders():
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.5, 0.9])
    wrong = np.array([True, False, False, True, True, True])
    curves = []
    for order in permutations(range(len(scores))):
        if (np.diff(scores[list(order)]) <= 0).all():
            curves.append(np.cumsum(wrong[list(order)]) / np.arange(1, len(scores) + 1))
    np.testing.assert_allclose(risk_coverage(scores, wrong), np.mean(curves, axis=0), atol=1e-12)
    assert aurc(scores, wrong) == pytest.approx(np.mean(curves), abs=1e-12)


def test_selective_risk_without_ties_is_the_error_among_the_most_confident():
    rng = np.random.default_rng(3)
    scores, wrong = rng.normal(size=200), rng.random(200) < 0.3
    expected = [wrong[np.argsort(-scores)[:k]].mean() for k in range(1, 201)]
    np.testing.assert_allclose(risk_coverage(scores, wrong), expected, atol=1e-12)
    assert aurc(np.zeros(200), wrong) == pytest.approx(wrong.mean(), abs=1e-12)


def test_intervals_equal_those_of_resampling_the_pictures_one_set_at_a_time():
    known, foreign = scores_of("a few ties")
    rng = np.random.default_rng(5)
    drawn = [(rng.choice(known, len(known)), rng.choice(foreign, len(foreign))) for _ in range(700)]
    for name, metric in {"auroc": auroc, "aupr": aupr, "fpr_at_95_tpr": fpr_at_95_tpr}.items():
        expected = np.percentile([metric(*sets) for sets in drawn], [2.5, 97.5])
        np.testing.assert_allclose(intervals(known, foreign)[name], expected, atol=0.025)


def test_memory_for_resamples_does_not_change_the_intervals(monkeypatch):
    known, foreign = scores_of("exactly 95 %")
    expected = intervals(known, foreign)
    monkeypatch.setattr(metrics, "_COUNTS_AT_ONCE", 100)
    assert intervals(known, foreign) == expected
