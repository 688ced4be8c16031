"""clip-benchmark's own functions on a loaded model, where it is installed."""

import numpy as np
import pytest
import torch
from PIL import Image

import clip_train

from . import files

zeroshot_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

CLASSES = ["cat", "dog", "house", "tree", "car", "fish", "bird"]
TEMPLATES = ["a photo of a {c}", "a drawing of a {c}"]


@pytest.fixture
def loaded(tmp_path):
    return clip_train.load(files.write_open_clip_folder(files.small_model(), tmp_path / "model"), device="cpu")


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.slow
def test_classification_logits_are_those_of_the_features(loaded):
    model, preprocess = loaded
    images, labels = pictures(28), torch.arange(28) % 7
    batches = [(torch.stack([preprocess(i) for i in images[k : k + 4]]), labels[k : k + 4]) for k in range(0, 28, 4)]
    classifier = zeroshot_classification.zero_shot_classifier(
        model, model.tokenize, CLASSES, TEMPLATES, "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(model, classifier, batches, "cpu", amp=False)
    prompts = [template.format(c=name) for name in CLASSES for template in TEMPLATES]
    classes = model.encode(texts=prompts).reshape(7, 2, -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    assert torch.equal(target, labels)
    assert np.abs(logits.numpy() - 100 * model.encode(images=images) @ classes.T).max() < 1e-3


@pytest.mark.slow
def test_retrieval_scores_are_those_of_the_features(loaded):
    model, preprocess = loaded
    images, texts = pictures(12), [[f"a photo of number {i}"] for i in range(12)]
    batches = [(torch.stack([preprocess(i) for i in images[k : k + 4]]), texts[k : k + 4]) for k in range(0, 12, 4)]
    scores = zeroshot_retrieval.evaluate(model, batches, model.tokenize, device="cpu", amp=False, recall_k_list=[1, 5])
    similarity = model.encode(images=images) @ model.encode(texts=[text for (text,) in texts]).T
    ranks = (similarity > np.diag(similarity)).sum(axis=0)
    assert scores["image_retrieval_recall@5"] == pytest.approx((ranks < 5).mean())
