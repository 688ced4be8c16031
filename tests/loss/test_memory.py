"""How the memory of a loss grows with the batch: every allocation of forward and backward, as torch reports them."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from clip_train.distributed.world import World
from clip_train.loss.clip import ClipLoss
from clip_train.loss.siglip import SigLipLoss
from tests.loss.reference import clip_loss, draw, siglip_loss


def peak_bytes(loss_fn, pairs):
    features = draw(pairs, width=64, dtype=torch.float32, bias=-10.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = loss_fn(features)
        (loss if isinstance(loss, torch.Tensor) else loss["contrastive_loss"]).backward()
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("loss_fn", "full_matrix"), [(ClipLoss, clip_loss), (SigLipLoss, siglip_loss)], ids=["clip", "siglip"]
)
def test_peak_memory_grows_with_the_batch_and_not_with_its_square(loss_fn, full_matrix):
    small, large = (peak_bytes(loss_fn(world=World(), tile=(256, 256)), pairs) for pairs in (1024, 2048))
    assert small < large <= 2.2 * small
    assert peak_bytes(full_matrix, 2048) > 3.5 * peak_bytes(full_matrix, 1024) > 20 * small
