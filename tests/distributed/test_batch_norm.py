import copy

import numpy as np
import pytest
import torch
from torch import nn

from clip_train.distributed.batch_norm import SyncBatchNorm2d, synchronize_batch_norms
from clip_train.distributed.parallel import parallelize
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.clip import ClipLoss
from clip_train.model.zoo import create_model
from clip_train.optim.adamw import build_adamw
from clip_train.step import TrainStep
from clip_train.types import Batch
from tests.gloo import run_on_ranks
from tests.loss.reference import clip_loss
from tests.model.reference import random_captions

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def small_resnet():
    return small_model("tiny-rn", {})


def small_efficientnet():
    return small_model("timm", {"timm": "test_efficientnet", "image_size": 64})


def small_model(name, vision):
    text = {"vocab_size": 200, "width": 64, "heads": 1, "layers": 1}
    model = create_model(name, seed=1, vision=vision, text=text).double()
    for name, parameter in model.named_parameters():  # the last norm of a block starts at zero, and would hide it
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.7)
    return model


def draw_batch(n):
    generator = torch.Generator().manual_seed(0)
    # Images differ in brightness along the batch, so that statistics of one half are not those of the whole.
    images = torch.rand(n, 64, 64, 3, generator=generator) * torch.linspace(60, 255, n)[:, None, None, None]
    lengths = [3 + i % 9 for i in range(n)]
    return Batch(
        images=images.to(torch.uint8),
        tokens=random_captions(lengths, vocab_size=200),
        lengths=torch.tensor(lengths),
        slots=torch.arange(n),
        valid=torch.ones(n, dtype=torch.bool),
    )


def step_of(model, wrapped, world, **options):
    optimizer = build_adamw(model, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-6)
    return TrainStep(
        model, wrapped=wrapped, loss_fn=ClipLoss(world=world), optimizer=optimizer, world=world, seed=0, **options
    )


def statistics(model):
    return {name: value.clone().numpy() for name, value in model.named_buffers() if name.endswith(STATISTICS)}


def on_rank(world, strategy, make):
    model = make()
    wrapped = parallelize(model, world=world, strategy=strategy, sync_batch_norm=True)
    batch = draw_batch(8)
    own = Batch(*(t[4 * world.rank : 4 * world.rank + 4] for t in batch))
    wrapped.train()
    step_of(model, wrapped, world).backward(own, step=0)
    # The scalars are averaged by the update, which is not made here.
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.startswith("logit")}
    whole = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).numpy() for n, g in gradients.items()}
    return whole, statistics(model), sorted(model.state_dict())


@pytest.mark.parametrize(
    ("strategy", "make"),
    [
        ("ddp", small_resnet),
        pytest.param("fsdp", small_resnet, marks=pytest.mark.slow),
        pytest.param("ddp", small_efficientnet, marks=pytest.mark.slow),
    ],
)
def test_gradients_and_statistics_over_two_ranks_equal_those_of_usual_norms_on_the_whole_batch(strategy, make):
    model, batch = make().train(), draw_batch(8)
    clip_loss(model(batch.images, batch.tokens)).backward()
    want = {n: p.grad.numpy() for n, p in model.named_parameters() if not n.startswith("logit")}
    for got, counted, names in run_on_ranks(on_rank, strategy, make):
        assert names == sorted(model.state_dict())
        for name, gradient in want.items():
            assert abs(got[name] - gradient).max() <= 1e-9 * max(1e-3, abs(gradient).max()), name
        for name, value in statistics(model).items():
            assert abs(counted[name] - value).max() < 1e-10, name


def losses_on_rank(world, strategy):
    model = small_resnet().float()
    wrapped = parallelize(model, world=world, strategy=strategy, precision="bf16")
    step, batch = step_of(model, wrapped, world, precision="bf16"), draw_batch(8)
    own = Batch(*(t[4 * world.rank : 4 * world.rank + 4] for t in batch))
    losses = [step(own, learning_rate=1e-3, step=i).loss.item() for i in range(3)]
    return losses, statistics(model)


@pytest.mark.slow
def test_sharded_norms_compute_in_float32_under_bf16_as_replicated_ones_do():
    for (sharded, counted), (replicated, wanted) in zip(
        run_on_ranks(losses_on_rank, "fsdp"), run_on_ranks(losses_on_rank, "ddp"), strict=True
    ):
        assert np.allclose(sharded, replicated, atol=0.02)
        for name, value in wanted.items():
            assert np.allclose(counted[name], value, rtol=0.02, atol=0.02), name


def test_gradient_caching_counts_each_micro_batch_once():
    batch = draw_batch(8)
    cached, by_hand = small_resnet(), small_resnet().train()
    train_step = step_of(cached, cached, World(), micro_batch_size=2)
    cached.train()
    train_step.backward(batch, step=0)
    with torch.no_grad():
        for first in (6, 0, 2, 4):  # the last one's graph is made first
            by_hand.encode_image(batch.images[first : first + 2])
    got, want = statistics(cached), statistics(by_hand)
    for name in want:
        assert abs(got[name] - want[name]).max() < 1e-12, name
    assert got["visual.bn1.num_batches_tracked"] == 4
    assert all(norm.track_running_stats for norm in cached.modules() if isinstance(norm, nn.BatchNorm2d))


def test_timms_norm_with_its_activation_is_replaced_by_one_that_computes_the_same():
    from timm.layers import BatchNormAct2d

    theirs = nn.Sequential(BatchNormAct2d(3, act_layer=nn.SiLU)).double()
    ours = copy.deepcopy(theirs)
    synchronize_batch_norms(ours, world=World())
    assert type(ours[0]) is SyncBatchNorm2d and list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.rand(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        got, want = (norm.train(training)(image.requires_grad_()) for norm in (ours, theirs))
        assert torch.allclose(got, want, atol=1e-12)
        assert torch.allclose(*(torch.autograd.grad(out.square().sum(), image)[0] for out in (got, want)), atol=1e-10)
    assert all(torch.allclose(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_models_without_batch_norms_and_norms_of_another_kind_are_refused():
    with pytest.raises(UserError, match="has no batch norms"):
        synchronize_batch_norms(nn.Sequential(nn.LayerNorm(3)), world=World())
    with pytest.raises(UserError, match="BatchNorm1d cannot be synchronised"):
        synchronize_batch_norms(nn.Sequential(nn.BatchNorm1d(3)), world=World())
