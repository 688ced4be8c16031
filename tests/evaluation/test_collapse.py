"""The collapse detector against the definitions, computed on the features themselves."""

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.collapse import TowerStatistics, effective_rank, mean_pairwise_cosine
from tests.gloo import run_on_ranks


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def reason_of(features):
    statistics = TowerStatistics(embed_dim=features.shape[1], world=World())
    for piece in features.split(7):
        statistics.add(piece)
    statistics.reduce()
    return statistics.reason("image")


def test_mean_cosine_and_effective_rank_equal_their_definitions():
    x = unit(torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    cosines = (x @ x.T).numpy()
    assert mean_pairwise_cosine(x.sum(0), num_rows=40) == pytest.approx(cosines[~np.eye(40, dtype=bool)].mean())
    p = np.linalg.svd(x.numpy(), compute_uv=False)
    p /= p.sum()
    assert effective_rank(x.T @ x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_healthy_features_pass():
    assert reason_of(unit(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)))) is None


def test_one_point_one_line_and_non_finite_values_are_found():
    noise = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    assert "mean cosine" in reason_of(unit(torch.ones(40, 9) + 0.01 * noise))
    line = torch.ones(40, 9) * torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None]
    assert "effective rank" in reason_of(unit(line))
    broken = unit(noise)
    broken[3, 4] = torch.nan
    assert reason_of(broken) == "1 of 40 image features are not finite, the first is number 4"


def test_two_similar_classes_are_no_collapse():
    assert reason_of(unit(torch.tensor([[1.0, 0.4], [1.0, -0.1]]))) is None


@pytest.mark.parametrize(("num_rows", "collapsed"), [(8, False), (15, False), (16, True)])
def test_a_few_prompts_that_differ_in_a_word_are_no_collapse(num_rows, collapsed):
    noise = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0))
    features = unit(torch.ones(num_rows, 64) + 0.12 * noise)
    assert 0.98 < float(mean_pairwise_cosine(features.double().sum(0), num_rows=num_rows)) < 0.99
    assert (reason_of(features) is not None) == collapsed


def test_a_few_equal_features_are_a_collapse():
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert "mean cosine" in reason_of(unit(torch.ones(3, 64) + 1e-4 * noise))


def _statistics_of_rank(world):
    statistics = TowerStatistics(embed_dim=4, world=world)
    features = torch.zeros(10, 4)
    features[:, world.rank] = 1  # one point per rank: collapsed alone, not together
    statistics.add(features)
    statistics.reduce()
    return statistics.reason("image")


@pytest.mark.slow
def test_the_ranks_are_judged_together():
    assert run_on_ranks(_statistics_of_rank, world_size=3) == [None] * 3
