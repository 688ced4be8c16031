"""The prompt lab against zero-shot classification in float64, and its search against plain definitions."""

from itertools import combinations

import numpy as np
import pytest
import torch

from clip_train.distributed.world import World
from clip_train.evaluation.prompts.lab import PromptLab, choose_ensemble, encode_templates, paired_gain
from tests.evaluation.toys import (
    ToyModel,
    ToyTokenizer,
    image_features_float64,
    random_pixels,
    text_feature_float64,
)

NAMES = ["missile", "corgi", "red fox", "missile", "gown"]
TEMPLATES = ["a photo of a {}.", "{c}", "art of the {}, in oil", "my {}", "a {} in the fog"]


@pytest.fixture(scope="module")
def lab():
    model, pixels = ToyModel(), random_pixels(120)
    vectors, first_class = encode_templates(
        model, tokenizer=ToyTokenizer(), classnames=NAMES, templates=TEMPLATES, world=World()
    )
    labels = np.random.default_rng(2).integers(0, len(NAMES), 120)
    return PromptLab(
        image_features=model.encode_image(torch.from_numpy(pixels)),
        labels=labels,
        template_vectors=vectors,
        first_class=first_class,
    )


def oracle_hits(templates, labels):
    """Return right answers of an ensemble, prompt by prompt; a tie goes to the lower class."""
    model = ToyModel()
    vectors = []
    for name in NAMES:
        own = [text_feature_float64(model, TEMPLATES[t].replace("{c}", name).replace("{}", name)) for t in templates]
        vectors.append(np.mean(own, axis=0) / np.linalg.norm(np.mean(own, axis=0)))
    cosines = image_features_float64(model, random_pixels(120)) @ np.array(vectors).T
    return cosines.argmax(axis=1) == labels


@pytest.mark.parametrize("templates", [[0], [2, 1], [0, 1, 2, 3, 4]])
def test_an_ensemble_scores_as_zero_shot_classification_does(lab, templates):
    everyone = np.ones(120, dtype=bool)
    assert (lab.hits(templates, everyone) == oracle_hits(templates, lab.labels)).all()
    some = np.arange(120) % 3 == 0
    assert lab.accuracy(templates, some) == oracle_hits(templates, lab.labels)[some].mean()


def plain_search(score, candidates, most):
    """Forward selection, then backward elimination, written as one reads it."""
    chosen = []
    while len(chosen) < most:
        options = [(score([*chosen, t]), t) for t in candidates if t not in chosen]
        best = max(value for value, _ in options)
        if chosen and best <= score(chosen):
            break
        chosen.append(min(t for value, t in options if value == best))
    while len(chosen) > 1:
        without = [[t for t in chosen if t != leaving] for leaving in chosen]
        best = max(score(rest) for rest in without)
        if best < score(chosen):
            break
        chosen = [rest for rest in without if score(rest) == best][-1]
    return chosen


@pytest.mark.parametrize("most", [1, 3, 5])
def test_the_search_is_forward_selection_then_pruning_on_the_given_images_only(lab, most):
    images = np.arange(120) % 2 == 0
    chosen = choose_ensemble(lab, images, most=most)
    assert chosen == plain_search(lambda t: oracle_hits(t, lab.labels)[images].mean(), range(5), most)
    shuffled = lab.labels.copy()
    shuffled[~images] = np.random.default_rng(0).permutation(shuffled[~images])
    other = PromptLab(
        image_features=lab.image_features,
        labels=shuffled,
        template_vectors=lab.template_vectors,
        first_class=lab.first_class,
    )
    assert choose_ensemble(other, images, most=most) == chosen


def test_no_single_template_beats_the_chosen_ones_where_they_were_chosen(lab):
    images = np.arange(120) % 2 == 0
    best = lab.accuracy(choose_ensemble(lab, images, most=5), images)
    assert best >= max(lab.accuracy([t], images) for t in range(5))
    assert best <= max(lab.accuracy(list(c), images) for n in range(1, 6) for c in combinations(range(5), n))


def test_labels_without_meaning_gain_where_chosen_and_not_on_held_out_images():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(300, 8, generator=generator), dim=1)
    vectors = torch.nn.functional.normalize(torch.randn(30, 4, 8, generator=generator), dim=-1)
    labels = np.random.default_rng(1).integers(0, 4, 300)
    lab = PromptLab(image_features=features, labels=labels, template_vectors=vectors, first_class=torch.arange(4))
    held_out = np.arange(300) % 2 == 1
    chosen = choose_ensemble(lab, ~held_out, most=5)
    assert lab.accuracy(chosen, ~held_out) > lab.accuracy(list(range(30)), ~held_out) + 0.05
    _, (low, high) = paired_gain(lab.hits(chosen, held_out), lab.hits(list(range(30)), held_out))
    assert low < 0 < high


def test_the_interval_of_a_gain_equals_resampling_the_images_one_by_one():
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(400) < 0.6, rng.random(400) < 0.5
    plain = []
    for _ in range(3000):
        drawn = rng.integers(0, 400, 400)
        plain.append(ours[drawn].mean() - theirs[drawn].mean())
    gain, interval = paired_gain(ours, theirs)
    assert gain == pytest.approx(ours.mean() - theirs.mean())
    assert interval == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.01)
