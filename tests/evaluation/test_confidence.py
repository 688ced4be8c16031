"""Intervals against textbook values and against the plain bootstrap."""

import numpy as np
import pytest

from clip_train.evaluation.confidence import (
    bootstrap_mean_per_class,
    bootstrap_mean_recall,
    bootstrap_ratio,
    wilson_interval,
)


def test_wilson_equals_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29 by the score method.
    for correct, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(correct, total=total) == pytest.approx((low, high), abs=5e-5)


def test_sampling_error_of_imagenet_at_sixty_percent_is_0_43_points():
    low, high = wilson_interval(30_000, total=50_000)
    assert (high - low) / 2 == pytest.approx(0.0043, abs=5e-5)


def test_grouped_bootstrap_equals_resampling_the_images_one_by_one():
    rng = np.random.default_rng(5)
    trials = rng.integers(1, 6, 300)
    hits = rng.binomial(trials, 0.4)
    plain = []
    for _ in range(4000):
        drawn = rng.integers(0, 300, 300)
        plain.append(hits[drawn].sum() / trials[drawn].sum())
    assert bootstrap_ratio(hits, trials) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.006)


def test_bootstrap_of_both_directions_resamples_an_image_with_all_its_captions():
    rng = np.random.default_rng(7)
    trials = rng.integers(1, 6, 300)
    hits, found = rng.binomial(trials, 0.4), rng.random(300) < 0.6
    plain = []
    for _ in range(3000):
        drawn = rng.integers(0, 300, 300)
        plain.append((hits[drawn].sum() / trials[drawn].sum() + found[drawn].mean()) / 2)
    assert bootstrap_mean_recall(hits, trials, found) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.006)


def test_bootstrap_of_the_mean_recall_equals_resampling_the_images_one_by_one():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 400)
    hit = rng.random(400) < 0.2 + 0.2 * labels
    correct, total = np.bincount(labels[hit], minlength=5), np.bincount(labels, minlength=5)
    plain = []
    for _ in range(4000):
        drawn = rng.integers(0, 400, 400)
        plain.append(np.mean([hit[drawn][labels[drawn] == c].mean() for c in range(4)]))
    assert bootstrap_mean_per_class(correct, total) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.006)


def test_an_interval_is_the_same_each_time():
    hits, trials = np.array([1, 0, 1, 1]), np.ones(4, dtype=int)
    assert bootstrap_ratio(hits, trials) == bootstrap_ratio(hits, trials)
