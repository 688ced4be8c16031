import pytest
import torch
import torch.nn.functional as F

from clip_train.config import load
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.clip import ClipLoss
from clip_train.loss.matryoshka import MatryoshkaLoss
from clip_train.loss.siglip import SigLipLoss
from tests.gloo import run_on_ranks

from .reference import clip_loss, draw, gradients, rows_of, siglip_loss, worst_error

SIZES = [4, 12]


def written_out(features, *, siglip, valid=None):
    """Mean of the full-matrix losses of the whole (32 dimensions) and of each prefix, by plain autograd."""
    full_matrix = siglip_loss if siglip else clip_loss
    losses = [full_matrix(features, valid=valid)]
    for size in SIZES:
        image, text = (F.normalize(t[:, :size], dim=-1) for t in (features.image, features.text))
        losses.append(full_matrix(features._replace(image=image, text=text), valid=valid))
    return sum(losses) / 3


def make(world, *, siglip, ring=False):
    inner = SigLipLoss(world=world, tile=(5, 7), ring=ring) if siglip else ClipLoss(world=world, tile=(5, 7))
    return MatryoshkaLoss(inner, sizes=SIZES)


def on_rank(world, cases):
    results = []
    for features, valid, siglip, ring, early in cases:
        size = len(features.image) // world.size
        rows = slice(world.rank * size, (world.rank + 1) * size)
        own = rows_of(features, rows)
        loss_fn = make(world, siglip=siglip, ring=ring)
        # As in a step: the gather of the texts starts before the loss is called, or within it.
        given = own._replace(text=loss_fn.on_text(own.text)) if early else own
        loss = loss_fn(given, valid=None if valid is None else valid[rows])["contrastive_loss"]
        results.append([t.numpy() for t in gradients(loss, own)])
    return results


def test_loss_and_gradients_on_two_ranks_equal_the_mean_over_the_sizes_written_out():
    plain = type(draw(2))(*(None if t is None else t.detach() for t in draw(24)))
    biased = type(draw(2))(*(t.detach() for t in draw(24, bias=-10.0)))
    unequal = torch.arange(24) % 5 != 0
    cases = [
        (plain, None, False, False, True),
        (plain, unequal, False, False, False),
        (biased, None, True, False, True),
        (biased, unequal, True, True, True),
    ]
    ranks = run_on_ranks(on_rank, cases)
    for i, (features, valid, siglip, _, _) in enumerate(cases):
        whole = rows_of(features, slice(None))
        want = gradients(written_out(whole, siglip=siglip, valid=valid), whole)
        got = [torch.from_numpy(x) for x in ranks[0][i]], [torch.from_numpy(x) for x in ranks[1][i]]
        # Shares times the number of ranks: losses and scalars average, features join.
        joined = [torch.cat(pair) / 2 if pair[0].ndim == 2 else sum(pair) / 2 for pair in zip(*got, strict=True)]
        assert worst_error(joined, want) < 1e-12, f"case {i}"


def test_metrics_are_those_of_the_whole_embedding():
    features = draw(24)
    loss_fn, alone = make(World(), siglip=False), ClipLoss(world=World())
    loss_fn(features)
    alone(features)
    assert torch.equal(loss_fn.metrics()["in_batch_recall@1"], alone.metrics()["in_batch_recall@1"])


def test_a_config_with_sizes_trains_on_prefixes_and_one_without_does_not():
    settings = ["model=tiny", "steps=10", "optim.warmup=1", "data.train=x"]
    config = load("train", [*settings, "model.matryoshka=[4,12]"])
    features = draw(24, width=64)
    got = config.build_loss(world=World())(features)["contrastive_loss"]
    alone = config.loss.build(world=World())
    parts = [
        alone(features._replace(image=F.normalize(features.image[:, :k]), text=F.normalize(features.text[:, :k])))
        for k in (4, 12, 64)
    ]
    assert got.item() == pytest.approx(sum(p["contrastive_loss"].item() for p in parts) / 3, rel=1e-12)
    assert isinstance(load("train", settings).build_loss(world=World()), ClipLoss)


@pytest.mark.parametrize("sizes", ["[12,4]", "[4,4]", "[0,4]", "[4,64]"])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(UserError, match=r"model\.matryoshka=.* must ascend"):
        load("train", ["model=tiny", "steps=10", "optim.warmup=1", "data.train=x", f"model.matryoshka={sizes}"])
