"""What the doctor measures of a batch, against slow references."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clip_train.distributed.world import World
from clip_train.health.measures import UpdateRatio, batch_measures, feature_measures
from clip_train.types import Batch


def pairs(rows=64, width=32, *, noise=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, width, generator=draw)
    text = image + noise * torch.randn(rows, width, generator=draw)
    return normalize(image, dim=1), normalize(text, dim=1)


def test_feature_measures_are_those_of_loops_over_pairs():
    image, text = pairs()
    found = feature_measures(image, text)
    x, y = image.double().numpy(), text.double().numpy()
    n = len(x)
    cosines = [x[i] @ x[j] for i in range(n) for j in range(n) if i != j]
    assert found["health/image_mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    p = np.linalg.svd(y, compute_uv=False)
    p = p / p.sum()
    assert found["health/text_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert found["health/modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert found["health/best_cosine"] == pytest.approx(np.mean([max(x[i] @ y[j] for j in range(n)) for i in range(n)]))
    margins = [x[i] @ y[i] - np.mean([x[i] @ y[j] for j in range(n) if j != i]) for i in range(n)]
    assert found["health/pair_margin"] == pytest.approx(np.mean(margins) / (np.std(margins, ddof=1) / n**0.5))


def test_the_margin_tells_pairs_from_shuffled_ones():
    image, text = pairs(128, noise=3.0)
    assert feature_measures(image, text)["health/pair_margin"] > 10
    shuffled = [feature_measures(image, text.roll(shift, 0))["health/pair_margin"] for shift in range(1, 40)]
    assert abs(np.mean(shuffled)) < 0.5 and np.std(shuffled) < 1.5


def test_a_collapsed_tower_has_rank_one_and_a_handful_of_rows_none():
    point = normalize(torch.ones(20, 8) + 1e-6 * torch.randn(20, 8), dim=1)
    found = feature_measures(point, pairs(20, 8)[1])
    assert found["health/image_effective_rank"] < 1.1 and found["health/image_mean_cosine"] > 0.999
    assert feature_measures(*pairs(4)) == {}
    assert feature_measures(point * float("nan"), point) == {}


def batch_of(captions, *, images=None, valid=None):
    tokens = torch.zeros(len(captions), 6, dtype=torch.int64)
    for row, caption in enumerate(captions):
        tokens[row, : len(caption)] = torch.tensor(caption)
    n = len(captions)
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=draw) if images is None else images
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    return Batch(pictures, tokens, (tokens != 0).sum(1), torch.arange(n), valid)


def test_captions_and_pictures_are_counted_by_hand():
    captions = [[1, 7, 2], [1, 2], [1, 8, 9, 7, 7, 2], [1, 7, 2], [1, 9, 2], [1, 2], [1, 4, 5, 6, 7, 2], [1, 9, 2]]
    valid = torch.tensor([True] * 7 + [False])
    batch = batch_of(captions, valid=valid)
    batch.images[3] = batch.images[6]
    found = batch_measures(batch, empty_length=2, world=World())
    # Seven pairs count; of the five with words, the first and the fourth share theirs.
    assert found == {
        "health/duplicate_captions": pytest.approx(2 / 5),
        "health/duplicate_images": pytest.approx(2 / 7),
        "health/empty_captions": pytest.approx(2 / 7),
        "health/truncated_captions": pytest.approx(2 / 7),
    }


def test_cached_features_in_place_of_pictures_are_compared_too():
    features = torch.randn(4, 16)
    features[2] = features[0]
    found = batch_measures(batch_of([[1, n, 2] for n in (3, 4, 5, 6)], images=features), empty_length=2, world=World())
    assert found["health/duplicate_images"] == 0.5 and found["health/duplicate_captions"] == 0


def test_the_update_after_a_logged_step_is_measured():
    model = torch.nn.Linear(30, 20)
    ratio = UpdateRatio(model)
    ratio.after_step(logged=True)
    assert ratio.take() == {}
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1e-3 * torch.randn(20, 30)
    ratio.after_step(logged=False)
    expected = float((model.weight.detach() - before).norm() / before.norm())
    assert ratio.take() == {"health/update_ratio": pytest.approx(expected, rel=1e-4)}
    ratio.after_step(logged=False)
    assert ratio.take() == {}
