"""How the memory of a loss grows with the batch: every allocation of forward and backward, as torch reports them."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from clip_train.distributed.world import World
from clip_train.loss.clip import ClipLoss
from clip_train.loss.siglip import SigLipLoss
from tests.loss.reference import clip_loss, draw, siglip_loss


def peak_bytes(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def features_of(pairs):
    return draw(pairs, width=64, dtype=torch.float32, bias=-10.0)


def both_passes(loss_fn, pairs):
    features = features_of(pairs)

    def run():
        loss = loss_fn(features)
        (loss if isinstance(loss, torch.Tensor) else loss["contrastive_loss"]).backward()

    return run


@pytest.mark.parametrize(
    ("loss_fn", "full_matrix"), [(ClipLoss, clip_loss), (SigLipLoss, siglip_loss)], ids=["clip", "siglip"]
)
def test_peak_memory_grows_with_the_batch_and_not_with_its_square(loss_fn, full_matrix):
    small, large = (peak_bytes(both_passes(loss_fn(world=World(), tile=(256, 256)), n)) for n in (1024, 2048))
    assert small < large <= 2.2 * small
    quarter, whole = (peak_bytes(both_passes(full_matrix, pairs)) for pairs in (1024, 2048))
    assert whole > 3.5 * quarter > 20 * small


@pytest.mark.parametrize("ring", [False, True])
def test_the_backward_pass_of_the_sigmoid_loss_hands_out_the_gradients_that_it_has(ring):
    features = features_of(1024)
    loss = SigLipLoss(world=World(), ring=ring, tile=(256, 256))(features)["contrastive_loss"]
    assert peak_bytes(loss.backward) < features.image.nbytes / 2
