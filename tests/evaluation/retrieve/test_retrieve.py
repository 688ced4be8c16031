"""Retrieval against a brute-force ranking in float64, and against hand-counted ties."""

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.retrieve.captioned_images import CaptionedImages
from clip_train.evaluation.retrieve.evaluator import Retrieve
from clip_train.evaluation.retrieve.ranking import Side, chance_of_recall, rank_right_answers
from tests.evaluation.toys import (
    ToyModel,
    ToySource,
    image_features_float64,
    random_pixels,
    text_feature_float64,
    toy_setting,
)

WORDS = ["red", "blue", "small", "fox", "cup", "boat", "striped", "old"]


def make(num_images, *, world=None, most_captions=3, distinct=True, chunk_elements=50, recall_k=(1, 5, 10)):
    world = world or World()
    rng = np.random.default_rng(3)
    captions, owner = [], []
    for image in range(num_images):
        for _ in range(rng.integers(1, most_captions + 1)):
            words = " ".join(rng.choice(WORDS, 2))
            captions.append(f"{words} {len(captions)}" if distinct else words)
            owner.append(image)
    pixels = random_pixels(num_images)
    images = CaptionedImages(source=ToySource(num_images), captions=captions, owner=np.array(owner))
    evaluator = Retrieve(
        images,
        setting=toy_setting(pixels, world=world, batch_size=4),
        recall_k=recall_k,
        chunk_elements=chunk_elements,
    )
    return evaluator, pixels


def oracle(model, pixels, captions, owner, *, right=None, recall_k=(1, 5, 10)):
    """Rank by loops over the full float64 matrix; equal captions are equal to the last bit, nothing else ties."""
    image_features = image_features_float64(model, pixels)
    cosines = np.array([image_features @ text_feature_float64(model, caption) for caption in captions])  # [T, N]
    if right is None:
        right = owner[:, None] == np.arange(len(pixels))[None]

    def rank(scores, is_right):
        best = scores[is_right].max()
        wrong = scores[~is_right]
        return 1 + (wrong > best).sum() + (wrong == best).sum() / 2

    to_image = np.array([rank(cosines[t], right[t]) for t in range(len(captions))])
    to_text = np.array([rank(cosines[:, i], right[:, i]) for i in range(len(pixels))])
    metrics = {}
    for k in recall_k:
        metrics[f"image_retrieval_recall@{k}"] = (to_image <= k).mean()
        metrics[f"text_retrieval_recall@{k}"] = (to_text <= k).mean()
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2
    return metrics


@pytest.mark.parametrize("most_captions", [1, 4])
def test_recalls_equal_the_float64_oracle(most_captions):
    evaluator, pixels = make(23, most_captions=most_captions)
    model = ToyModel()
    expected = oracle(model, pixels, evaluator.images.captions, evaluator.images.owner)
    assert evaluator.evaluate(model).metrics == pytest.approx(expected, abs=1e-12)


def test_equal_captions_on_different_images_count_half_a_place_and_are_right_when_lenient():
    evaluator, pixels = make(30, distinct=False, recall_k=(1, 2, 5))
    captions, owner = np.array(evaluator.images.captions), evaluator.images.owner
    assert len(set(captions)) < len(captions)
    model = ToyModel()
    result = evaluator.evaluate(model)
    strict = {name: value for name, value in result.metrics.items() if not name.startswith("lenient_")}
    assert strict == pytest.approx(oracle(model, pixels, captions, owner, recall_k=(1, 2, 5)), abs=1e-12)
    assert result.details["text_retrieval_tied"] > 0
    has_caption = np.array([[c in captions[owner == i] for i in range(30)] for c in captions])
    lenient = oracle(model, pixels, captions, owner, right=has_caption, recall_k=(1, 2, 5))
    found = {name.removeprefix("lenient_"): v for name, v in result.metrics.items() if name.startswith("lenient_")}
    assert found == pytest.approx(lenient, abs=1e-12)
    # One draw finds an image with the caption with the probability of such images.
    assert result.chance["lenient_image_retrieval_recall@1"] == pytest.approx(has_caption.mean())
    assert result.chance["image_retrieval_recall@1"] == pytest.approx(1 / 30)
    shared = sum(row.sum() > 1 for row in has_caption)
    assert any(f"{shared} of {len(captions)} captions belong to several" in warning for warning in result.warnings)


@pytest.mark.parametrize("logit_bias", [None, -2.0])
@pytest.mark.parametrize("chunk_elements", [50, 2**24])
def test_the_loss_of_pairs_is_that_of_the_whole_set_as_one_batch(logit_bias, chunk_elements):
    evaluator, pixels = make(23, most_captions=1, chunk_elements=chunk_elements)
    model = ToyModel(logit_bias=logit_bias)
    texts = np.array([text_feature_float64(model, caption) for caption in evaluator.images.captions])
    logits = torch.from_numpy(np.exp(3.0) * image_features_float64(model, pixels) @ texts.T)
    if logit_bias is None:
        of_images, of_texts = (torch.nn.functional.cross_entropy(way, torch.arange(23)) for way in (logits, logits.T))
        expected = (of_images + of_texts) / 2
    else:
        target = torch.eye(23, dtype=torch.float64)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits + logit_bias, target) * 23
    assert evaluator.evaluate(model).loss == pytest.approx(float(expected), rel=1e-5)


def test_pictures_with_several_captions_have_no_loss_of_pairs():
    assert make(23, most_captions=4)[0].evaluate(ToyModel()).loss is None


def test_the_size_of_the_chunks_changes_nothing():
    results = [make(23, chunk_elements=n)[0].evaluate(ToyModel()) for n in (1, 64, 2**24)]
    for other in results[1:]:
        assert other.metrics == results[0].metrics
        np.testing.assert_array_equal(other.predictions["text_twice_rank"], results[0].predictions["text_twice_rank"])


def test_a_tie_with_one_wrong_answer_is_rank_one_and_a_half():
    features = torch.eye(3)
    queries = Side(features[:1], torch.tensor([0]), torch.tensor([[0]]))
    # The right answer (id 0) and one wrong one have the same content; the third is orthogonal.
    gallery = Side(features[:2], torch.tensor([0, 0, 1]), torch.tensor([[0], [1], [2]]))
    ranks = rank_right_answers(queries, gallery, world=World(), chunk_elements=10)
    assert ranks.twice_rank.tolist() == [3]
    assert ranks.tied.tolist() == [True]


def test_k_above_the_gallery_is_left_out_with_a_warning():
    result = make(7)[0].evaluate(ToyModel())
    assert "image_retrieval_recall@10" not in result.metrics
    assert "text_retrieval_recall@5" in result.metrics
    assert any("recall@10" in warning for warning in result.warnings)


def test_chance_equals_drawing_answers_at_random():
    num_right = np.array([1, 2, 5])
    rng = np.random.default_rng(0)
    draws = rng.permuted(np.tile(np.arange(9), (20000, 1)), axis=1)[:, :4]
    drawn = np.mean([(draws < r).any(axis=1).mean() for r in num_right])
    assert chance_of_recall(num_right, num_gallery=9, k=4) == pytest.approx(drawn, abs=0.01)
    assert chance_of_recall(np.ones(5), num_gallery=50, k=10) == pytest.approx(10 / 50)


def test_collapsed_text_features_get_a_reason_and_no_score():
    model = ToyModel()
    model.text_weight = torch.ones_like(model.text_weight)
    result = make(23)[0].evaluate(model)
    assert result.metrics == {}
    assert "text features" in result.collapsed


def test_the_pictures_of_the_report_carry_their_nearest_captions():
    evaluator, pixels = make(23)
    model = ToyModel()
    result = evaluator.evaluate(model)
    captions = evaluator.images.captions
    text_features = np.array([text_feature_float64(model, caption) for caption in captions])
    cosines = image_features_float64(model, pixels) @ text_features.T
    for picture, top, cosine in zip(
        *(result.predictions[n] for n in ("picture", "picture_top", "picture_cosine")), strict=True
    ):
        expected = np.argsort(-cosines[picture], kind="stable")[:5]
        np.testing.assert_array_equal(top, expected)
        np.testing.assert_allclose(cosine, cosines[picture][expected], atol=1e-5)
    pairs, of = result.predictions["pair_image"], result.predictions["pair_caption"]
    np.testing.assert_allclose(result.predictions["pair_cosine"], cosines[pairs][:, of], atol=1e-5)
