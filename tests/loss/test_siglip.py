import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_train.distributed.world import World
from clip_train.loss.config import SigLipLossConfig
from clip_train.loss.siglip import SigLipLoss
from tests.gloo import run_on_ranks
from tests.loss.reference import draw, gradients, rows_of, siglip_loss, worst_error
from tests.loss.test_clip import MASKS, union


def evaluate(features, *, valid=None, ids=None, tile=None, ring=False):
    loss_fn = SigLipLoss(world=World(), ignore_duplicates=ids is not None, tile=tile, ring=ring)
    return gradients(loss_fn(features, valid=valid, caption_ids=ids)["contrastive_loss"], features)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tile", [(7, 7), (64, 64), (1000, 1000)])
def test_one_process_equals_autograd_on_the_full_matrix(tile, ring, masks):
    masks = MASKS[masks](96)
    for scale, bias in ((10.0, -10.0), (60.0, -3.0)):
        features = draw(96, scale=scale, bias=bias)
        want = gradients(siglip_loss(features, **masks), features)
        assert worst_error(evaluate(features, tile=tile, ring=ring, **masks), want) < 1e-12


def test_no_model_with_equal_logits_has_a_lower_loss_than_that_of_guessing():
    biases = torch.linspace(-4, -2, 101, dtype=torch.float64)  # no cosine counts at this scale
    losses = [siglip_loss(draw(24, scale=1e-12, bias=float(bias))).item() for bias in biases]
    assert SigLipLossConfig().loss_of_guessing(24) == pytest.approx(min(losses), abs=1e-4)
    assert SigLipLossConfig().loss_of_guessing(1) == 0


def test_float32_stays_within_1e_5():
    features = draw(300, width=64, scale=10.0, bias=-10.0)
    want = gradients(siglip_loss(features), features)
    assert (
        worst_error(
            evaluate(
                features._replace(**{k: v.detach().float().requires_grad_() for k, v in features._asdict().items()})
            ),
            want,
        )
        < 1e-5
    )


def test_a_backward_pass_may_be_repeated():
    features = draw(30, scale=10.0, bias=-10.0)
    loss = SigLipLoss(world=World())(features)["contrastive_loss"]
    once, again = (torch.autograd.grad(loss, features, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradient_of_padding_is_exactly_zero():
    features, masks = draw(96, scale=10.0, bias=-10.0), MASKS["both"](96)
    _, image, text, *_ = evaluate(features, tile=(13, 50), **masks)
    assert image[~masks["valid"]].abs().max() == 0 and text[~masks["valid"]].abs().max() == 0


def test_a_model_without_a_bias_is_refused():
    with pytest.raises(ValueError, match="logit_bias"):
        SigLipLoss(world=World())(draw(4))


@pytest.mark.parametrize("tile", [(16, 16), (128, 128)])
def test_three_products_and_no_kept_logits_at_any_tile_size(tile):
    kept = []
    features = draw(128, width=64, dtype=torch.float32, scale=10.0, bias=-10.0)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        FlopCounterMode(display=False) as flops,
    ):
        SigLipLoss(world=World(), tile=tile)(features)["contrastive_loss"].backward()
    assert flops.get_total_flops() == 3 * 2 * 128 * 128 * 64
    assert sum(t.nbytes for t in kept) <= features.image.nbytes + 64


def on_rank(world, cases):
    """Loss and gradients of this rank's rows in every case."""
    results = []
    for features, valid, ids, tile, ring in cases:
        size = len(features.image) // world.size
        rows = slice(world.rank * size, (world.rank + 1) * size)
        own = rows_of(features, rows)
        loss_fn = SigLipLoss(world=world, ignore_duplicates=ids is not None, tile=tile, ring=ring)
        masks = {k: None if v is None else v[rows] for k, v in (("valid", valid), ("caption_ids", ids))}
        got = gradients(loss_fn(own, **masks)["contrastive_loss"], own)
        results.append(([t.numpy() for t in got], loss_fn.metrics()["in_batch_recall@1"].item()))
    return results


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_equal_one_process_with_the_whole_batch(ranks):
    features = type(draw(2))(*(t.detach() for t in draw(96, scale=10.0, bias=-10.0)))
    unequal, repeated = MASKS["unequal"](96)["valid"], MASKS["duplicates"](96)["ids"]
    masks = [(None, None, (7, 7)), (unequal, None, (64, 64)), (unequal, repeated, None)]
    cases = [(features, *m, ring) for m in masks for ring in (False, True)]
    per_rank = run_on_ranks(on_rank, cases, world_size=ranks)
    for i, (_, valid, ids, _, _) in enumerate(cases):
        whole = rows_of(features, slice(None))
        want = gradients(siglip_loss(whole, valid=valid, ids=ids), whole)
        assert worst_error(union(per_rank, i), want) < 1e-12, f"case {i}"
        alone = SigLipLoss(world=World(), ignore_duplicates=ids is not None)
        alone(whole, valid=valid, caption_ids=ids)
        recall = sum(rank[i][1] for rank in per_rank) / ranks
        assert recall == pytest.approx(alone.metrics()["in_batch_recall@1"].item())
