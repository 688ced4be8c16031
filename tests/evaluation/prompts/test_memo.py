"""Large classifiers are made once for the same weights, and anew for any others."""

import pytest
import torch
from torch import nn

from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.evaluation.features import PrefixEncoder, evaluating
from clip_train.evaluation.interruptible import InterruptibleEncoder
from clip_train.evaluation.prompts.classifier import build_classifier, build_ensembles, tokenize_prompts
from clip_train.evaluation.prompts.files import load_templates
from tests.evaluation.toys import ToyTokenizer


class CountingModel(nn.Module):
    """Mean embedding of the tokens; counts the prompts that it encodes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(1000, 6)
        self.visual = nn.Linear(2, 2)
        self.logit_scale, self.logit_bias = torch.zeros(()), None
        self.encoded = 0

    def encode_text(self, tokens, *, normalize=True):
        self.encoded += len(tokens)
        x = (self.embedding(tokens) * (tokens > 0)[..., None]).sum(dim=1)
        return torch.nn.functional.normalize(x, dim=-1)


@pytest.fixture
def model():
    return CountingModel()


def prompts_of(names):
    return tokenize_prompts(ToyTokenizer(), classnames=names, templates=load_templates("imagenet"))


NAMES = [f"{'abcdefghij'[i % 10] * (1 + i // 10)} thing" for i in range(30)]


def build(model, names=NAMES, *, precision="fp32"):
    with evaluating(model, world=World(), precision=precision):
        return build_classifier(model, prompts_of(names), world=World()).vectors


def test_the_same_weights_and_prompts_are_encoded_once(model):
    first = build(model)
    assert model.encoded == 2400
    assert torch.equal(build(model), first) and model.encoded == 2400
    with torch.no_grad():
        model.visual.weight += 1  # the image tower has no say in it
    build(model)
    assert model.encoded == 2400


def test_what_a_run_in_training_builds_is_remembered_between_its_evaluations(model):
    def wrapped():
        return InterruptibleEncoder(model, wanted=lambda: StopReason.none, world=World())

    first = build(wrapped())
    assert torch.equal(build(wrapped()), first) and torch.equal(build(model), first)
    assert model.encoded == 2400
    cut = build(PrefixEncoder(model, embed_dim=3, full=6))  # other features, of the same weights
    assert cut.shape == (30, 3) and model.encoded == 4800


def test_a_single_changed_value_order_or_precision_encodes_anew(model):
    before = build(model)
    with torch.no_grad():
        model.embedding.weight[ord("t") % 97 + 1, 3] += 0.5
    after = build(model)
    assert model.encoded == 4800 and not torch.equal(before, after)
    fresh = CountingModel()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(build(fresh), after)
    assert torch.equal(build(model, NAMES[::-1]), after.flip(0)) and model.encoded == 7200
    build(model, precision="bf16")
    assert model.encoded == 9600
    with evaluating(model, world=World(), precision="fp32"):
        whole, _ = build_ensembles(model, prompts_of(NAMES), world=World(), parts=[[0, 3]])
    assert torch.equal(whole.vectors, after) and model.encoded == 12_000


def test_small_sets_and_models_whose_weights_cannot_be_told_are_encoded_every_time(model):
    for _ in range(2):
        build(model, NAMES[:5])
    assert model.encoded == 800
    hidden = CountingModel()
    weight = hidden.embedding
    del hidden.embedding, hidden.visual
    object.__setattr__(hidden, "embedding", weight)
    for _ in range(2):
        build(hidden)
    assert hidden.encoded == 4800
