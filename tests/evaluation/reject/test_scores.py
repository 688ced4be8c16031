"""Every score against its formula in float64 numpy."""

import numpy as np
import pytest
import torch

from clip_train.calibration import RejectScore
from clip_train.evaluation.reject.scores import negative_words, reject_scores

SCALE = 30.0


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


@pytest.fixture
def cosines():
    return np.random.default_rng(0).uniform(-0.3, 0.9, (50, 6))


def test_scores_equal_their_formulas(cosines):
    negative = np.random.default_rng(1).uniform(-0.3, 0.5, (50, 9))
    found = reject_scores(
        torch.from_numpy(cosines).float(), logit_scale=SCALE, negative_cosines=torch.from_numpy(negative).float()
    )
    ordered = np.sort(cosines, axis=1)
    both = softmax(SCALE * np.concatenate([cosines, negative], axis=1))
    expected = {
        RejectScore.max_cosine: ordered[:, -1],
        RejectScore.mcm: softmax(cosines).max(axis=1),
        RejectScore.msp: softmax(SCALE * cosines).max(axis=1),
        RejectScore.margin: ordered[:, -1] - ordered[:, -2],
        RejectScore.energy: np.log(np.exp(SCALE * cosines).sum(axis=1)) / SCALE,
        RejectScore.negative_labels: both[:, :6].sum(axis=1),
    }
    assert list(found) == list(RejectScore) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, atol=2e-5, err_msg=name)


def test_large_scales_do_not_overflow(cosines):
    found = reject_scores(torch.from_numpy(cosines).float(), logit_scale=1000.0)
    assert all(values.isfinite().all() for values in found.values())


def test_negative_words_are_those_farthest_from_the_labels():
    rng = np.random.default_rng(2)
    labels, words = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 40, 8)))
    nearness = np.sort(words @ labels.T, axis=1)[:, 37]  # 38 of 40 are 95 %
    found = negative_words(torch.from_numpy(words), torch.from_numpy(labels))
    assert found.tolist() == np.argsort(nearness)[:6].tolist()
    assert len(negative_words(torch.from_numpy(words[:3]), torch.from_numpy(labels))) == 1
