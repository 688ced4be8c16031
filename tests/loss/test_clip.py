import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_train.distributed.world import World
from clip_train.loss.clip import ClipLoss
from clip_train.types import Features
from tests.gloo import run_on_ranks
from tests.loss.reference import clip_loss, draw, gradients, rows_of, worst_error


def evaluate(features, *, valid=None, ids=None, tile=None):
    loss_fn = ClipLoss(world=World(), ignore_duplicates=ids is not None, tile=tile)
    return gradients(loss_fn(features, valid=valid, caption_ids=ids)["contrastive_loss"], features)


MASKS = {
    "all": lambda n: {},
    "unequal": lambda n: {"valid": (torch.arange(n) % 7 != 2) & (torch.arange(n) < n - 5)},
    "duplicates": lambda n: {"ids": torch.arange(n) * 7 % (n // 3)},
    "both": lambda n: MASKS["unequal"](n) | MASKS["duplicates"](n),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("tile", [(7, 7), (13, 50), (1000, 1000)])
def test_one_process_equals_autograd_on_the_full_matrix(tile, scale, masks):
    features, masks = draw(96, scale=scale), MASKS[masks](96)
    want = gradients(clip_loss(features, **masks), features)
    assert worst_error(evaluate(features, tile=tile, **masks), want) < 1e-12


def test_float32_stays_within_1e_5():
    features = draw(300, width=64, scale=100.0)
    want = gradients(clip_loss(features), features)
    got = evaluate(Features(*(None if t is None else t.detach().float().requires_grad_() for t in features)))
    assert worst_error(got, want) < 1e-5


def test_two_evaluations_are_bitwise_equal():
    features = draw(300, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(features), evaluate(features), strict=True))


def test_gradient_of_padding_is_exactly_zero():
    features, masks = draw(96), MASKS["both"](96)
    _, image, text, _ = evaluate(features, tile=(13, 50), **masks)
    assert image[~masks["valid"]].abs().max() == 0 and text[~masks["valid"]].abs().max() == 0


def test_duplicates_as_negatives_ignore_the_ids():
    features = draw(40)
    loss_fn = ClipLoss(world=World())
    ids = torch.zeros(40, dtype=torch.int64)
    assert loss_fn(features, caption_ids=ids)["contrastive_loss"] == loss_fn(features)["contrastive_loss"]


def test_ignoring_duplicates_without_ids_is_refused():
    with pytest.raises(ValueError, match="caption_ids"):
        ClipLoss(world=World(), ignore_duplicates=True)(draw(4))


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (0, 2)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    features = draw(50)
    want = gradients(clip_loss(features), features)[1:]
    leaves = list(features[:3])
    for i in frozen:
        leaves[i] = leaves[i].detach()
    kept = [i for i in range(3) if i not in frozen]
    loss = ClipLoss(world=World(), tile=(13, 20))(Features(*leaves, None))["contrastive_loss"]
    got = torch.autograd.grad(loss, [leaves[i] for i in kept])
    assert worst_error(got, [want[i] for i in kept]) < 1e-12


def test_in_batch_recall_counts_images_whose_caption_fits_best():
    features, valid = draw(64, scale=5.0), torch.arange(64) < 50
    loss_fn = ClipLoss(world=World(), tile=(13, 20))
    loss_fn(features, valid=valid)
    best = (features.image[:50] @ features.text[:50].T).argmax(1) == torch.arange(50)
    assert 0 < best.double().mean() < 1
    assert loss_fn.metrics()["in_batch_recall@1"].item() == pytest.approx(best.double().mean().item())


def test_text_gradients_of_a_second_use_are_added():
    features = draw(20)
    loss_fn = ClipLoss(world=World())
    text = loss_fn.on_text(features.text)
    loss = loss_fn(features._replace(text=text))["contrastive_loss"] + (text**3).sum()
    got = torch.autograd.grad(loss, features.text)
    want = torch.autograd.grad(clip_loss(features) + (features.text**3).sum(), features.text)
    assert worst_error(got, want) < 1e-12


@pytest.mark.parametrize("cosine", [1.0, 0.0])
def test_identical_and_orthogonal_features_stay_finite_at_the_highest_scale(cosine):
    image = torch.eye(64)
    text = image.clone() if cosine else image.roll(1, 0)
    features = Features(image, text, torch.tensor(math.log(100.0)), None)
    features = Features(*(t.requires_grad_() for t in features[:3]), None)
    got, want = evaluate(features, tile=(7, 20)), gradients(clip_loss(features), features)
    assert all(t.isfinite().all() for t in got)
    assert (got[0] - want[0]).abs() < 1e-5 and (got[1] - want[1]).abs().max() < 1e-5


def test_a_loss_scale_for_float16_passes_through():
    features = draw(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        loss = ClipLoss(world=World())(features)["contrastive_loss"]
    got = torch.autograd.grad(loss * 2.0**16, features[:3])
    want = gradients(clip_loss(features), features)[1:]
    assert all(g.isfinite().all() for g in got)
    assert worst_error([g / 2.0**16 for g in got], want) < 5e-3


def hard_features(pairs=2048, width=512):
    """Clustered features at the highest scale, where a rounded logit hurts most."""
    g = torch.Generator().manual_seed(1)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    own, gap, base = normal(pairs, width), normal(2, width), normal(width)
    cluster = unit(normal(64, width))[torch.randint(0, 64, (pairs,), generator=g)]
    image, text = (
        unit(unit(own) * 0.22 + cluster * 0.4 + unit(normal(pairs, width)) * 0.62 + unit(base) * 0.28 + unit(m) * 0.6)
        for m in gap
    )
    return Features(*(t.requires_grad_() for t in (image, text, torch.tensor(100.0).double().log())), None)


class Bf16Round(torch.autograd.Function):
    """Round value and gradient to bf16, as an operation that runs in bf16 does."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().float()


def test_bf16_gradients_are_three_times_closer_than_those_of_an_autocast_matrix():
    exact = hard_features()
    want = gradients(clip_loss(exact), exact)
    short = Features(*(t.detach().float().requires_grad_() for t in exact[:3]), None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ClipLoss(world=World())(short)["contrastive_loss"]
    got = gradients(loss, short)
    logits = Bf16Round.apply(Bf16Round.apply(short.logit_scale.exp() * short.image) @ Bf16Round.apply(short.text).T)
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    autocast = gradients((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2, short)
    for i in (1, 2):
        ours, theirs = worst_error(got[i : i + 1], want[i : i + 1]), worst_error(autocast[i : i + 1], want[i : i + 1])
        assert ours < 5e-3 and theirs > 3 * ours


def test_backward_keeps_features_and_sums_only():
    kept = []
    features = draw(512, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ClipLoss(world=World(), tile=(64, 64))(features)
    inputs = features.image.nbytes + features.text.nbytes
    assert sum(t.nbytes for t in kept) <= inputs + 2 * 512 * 4 + 64


def test_one_product_forward_and_three_backward():
    features = draw(128, width=64, dtype=torch.float32)
    with FlopCounterMode(display=False) as forward:
        loss = ClipLoss(world=World(), tile=(50, 60))(features)["contrastive_loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    product = 2 * 128 * 128 * 64
    assert (forward.get_total_flops(), backward.get_total_flops()) == (product, 3 * product)


# ------------------------------------------------------------------ several ranks


def on_rank(world, cases):
    """Loss, gradients and metrics of this rank's rows in every case."""
    results = []
    for features, valid, ids, tile in cases:
        size = len(features.image) // world.size
        rows = slice(world.rank * size, (world.rank + 1) * size)
        own = rows_of(features, rows)
        loss_fn = ClipLoss(world=world, ignore_duplicates=ids is not None, tile=tile)
        loss = loss_fn(
            own,
            valid=None if valid is None else valid[rows],
            caption_ids=None if ids is None else ids[rows],
        )["contrastive_loss"]
        got = gradients(loss, own)
        results.append(([t.numpy() for t in got], loss_fn.metrics()["in_batch_recall@1"].item()))
    return results


def union(per_rank, case):
    """What averaging ranks makes of their results: mean loss, mean scalars, each rank's rows over the rank count."""
    ranks = [[torch.as_tensor(t) for t in rank[case][0]] for rank in per_rank]
    size = len(ranks)
    return [
        sum(r[0] for r in ranks) / size,
        torch.cat([r[1] for r in ranks]) / size,
        torch.cat([r[2] for r in ranks]) / size,
        *(sum(r[i] for r in ranks) / size for i in range(3, len(ranks[0]))),
    ]


def cases_for(pairs):
    features, hot = draw(pairs), draw(pairs, scale=100.0, seed=1)
    unequal, repeated = MASKS["unequal"](pairs)["valid"], MASKS["duplicates"](pairs)["ids"]
    empty_rank = torch.arange(pairs) < pairs // 4
    plain = lambda f: Features(*(None if t is None else t.detach() for t in f))  # noqa: E731
    return [
        (plain(features), None, None, (7, 7)),
        (plain(hot), None, None, (13, 50)),
        (plain(hot), unequal, None, (1000, 1000)),
        (plain(features), None, repeated, (7, 50)),
        (plain(features), unequal, repeated, None),
        (plain(features), empty_rank, None, (7, 50)),
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_equal_one_process_with_the_whole_batch(ranks):
    cases = cases_for(96)
    per_rank = run_on_ranks(on_rank, cases, world_size=ranks)
    for i, (features, valid, ids, _) in enumerate(cases):
        whole = rows_of(features, slice(None))
        want = gradients(clip_loss(whole, valid=valid, ids=ids), whole)
        assert worst_error(union(per_rank, i), want) < 1e-12, f"case {i}"
        alone = ClipLoss(world=World(), ignore_duplicates=ids is not None)
        alone(whole, valid=valid, caption_ids=ids)
        recall = sum(rank[i][1] for rank in per_rank) / ranks
        assert recall == pytest.approx(alone.metrics()["in_batch_recall@1"].item())
