"""Outliers of the gradient norm, against scipy-free references; nothing is said of ordinary noise."""

import math
import random

import numpy as np
import pytest
import torch

from clip_train.health.gradients import GradientNorms


def norms(steps, *, spikes=(), seed=0):
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        falling = 2.0 * math.exp(-step / 400) + 0.2
        yield step, falling * math.exp(0.15 * draw.gauss(0, 1)) * (12 if step in spikes else 1)


def test_a_spike_is_found_at_its_step_and_ordinary_noise_is_not():
    collected, found = GradientNorms(), []
    for step, norm in norms(1000, spikes=(333, 777)):
        collected.add(torch.tensor(norm), step=step)
        if step % 20 == 0:
            found += collected.judge()[1]
    assert [outlier.step for outlier in found] == [333, 777]
    assert all(5 < outlier.norm / outlier.usual < 25 for outlier in found)


def test_the_score_is_that_of_numpy():
    collected, values = GradientNorms(), [norm for _, norm in norms(251)]
    for step, norm in enumerate(values[:250], start=1):
        collected.add(torch.tensor(norm, dtype=torch.float64), step=step)
    collected.judge()
    collected.add(torch.tensor(values[250], dtype=torch.float64), step=251)
    past = np.log(values[50:250])
    middle = np.median(past)
    expected = (np.log(values[250]) - middle) / (1.4826 * np.median(np.abs(past - middle)))
    assert collected.judge() == ({"train/grad_norm_zscore": pytest.approx(expected)}, [])


def test_the_first_steps_and_faults_are_not_judged():
    collected = GradientNorms()
    for step, norm in enumerate([1.0, 50.0, math.nan, math.inf, 0.0] * 8, start=1):
        collected.add(torch.tensor(norm), step=step)
    assert collected.judge() == ({}, [])
    assert collected.judge() == ({}, [])
