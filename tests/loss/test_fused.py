"""The kernels of the CUDA tiles: interpreted on the CPU, compiled for GPUs elsewhere, run where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from clip_train.distributed.world import World
from clip_train.loss import fused
from clip_train.loss.clip import ClipLoss
from clip_train.loss.siglip import SigLipLoss
from clip_train.types import Features
from tests.loss.reference import clip_loss, draw, gradients, siglip_loss, worst_error
from tests.loss.test_clip import MASKS, hard_features

pytest.importorskip("triton")
TILES = [(96, (13, 50)), (300, (113, 260))]  # tiles of less than one block of a kernel, and of several


@pytest.fixture
def interpreted(monkeypatch):
    """Let CPU tensors take CUDA's tiles. conftest.py has Triton interpret where there is no GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here: `TRITON_INTERPRET=1 pytest tests/loss/test_fused.py`")
    monkeypatch.setattr(fused, "LogitTiles", fused.FusedLogitTiles)


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_fused_tiles_equal_autograd_on_the_full_matrix(masks, size, interpreted):
    count, tile = size
    features, masks = draw(count, scale=100.0), MASKS[masks](count)
    want = gradients(clip_loss(features, **masks), features)
    loss_fn = ClipLoss(world=World(), ignore_duplicates="ids" in masks, tile=tile)
    values = loss_fn(features, valid=masks.get("valid"), caption_ids=masks.get("ids"))
    assert worst_error(gradients(values["contrastive_loss"], features), want) < 1e-12


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_the_fused_sigmoid_loss_equals_autograd_on_the_full_matrix(masks, size, interpreted):
    count, tile = size
    features, masks = draw(count, scale=10.0, bias=-10.0), MASKS[masks](count)
    want = gradients(siglip_loss(features, **masks), features)
    loss_fn = SigLipLoss(world=World(), ignore_duplicates="ids" in masks, tile=tile)
    values = loss_fn(features, valid=masks.get("valid"), caption_ids=masks.get("ids"))
    assert worst_error(gradients(values["contrastive_loss"], features), want) < 1e-12


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_fused_and_plain_tiles_count_the_same_hits(kind, interpreted, monkeypatch):
    bias = {"bias": -10.0} if kind is SigLipLoss else {}
    features = draw(200, scale=20.0, dtype=torch.float32, **bias)
    valid = MASKS["unequal"](200)["valid"]
    losses, hits = [], []
    for _ in range(2):
        loss_fn = kind(world=World(), tile=(70, 90))
        losses.append(loss_fn(features, valid=valid)["contrastive_loss"])
        hits.append(loss_fn.metrics()["in_batch_recall@1"])
        monkeypatch.undo()  # the second is plain
    assert 0 < hits[0] < 1 and hits[0] == hits[1]
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_a_number_that_is_not_finite_reaches_the_loss_and_a_gradient(kind, value, interpreted):
    features = draw(40, scale=10.0, dtype=torch.float32, **({"bias": -10.0} if kind is SigLipLoss else {}))
    with torch.no_grad():
        features.text[3, 1] = value
    loss = kind(world=World(), tile=(16, 24))(features)["contrastive_loss"]
    assert not loss.isfinite()
    assert not all(gradient.isfinite().all() for gradient in gradients(loss, features)[1:])


def test_a_softplus_far_below_zero_keeps_its_digits(interpreted):
    """1 + exp(-18) is 1 + 1.5e-8: in float32 log(1 + e) would be 0."""
    features = draw(64, scale=1.0, dtype=torch.float32, bias=-18.0)
    exact = Features(*(t.detach().double().requires_grad_() for t in features))
    want = SigLipLoss(world=World())(features)["contrastive_loss"].detach().double()
    assert abs(want - siglip_loss(exact).detach()) < 1e-6 * want
    kernels = pytest.importorskip("clip_train.loss.kernels")
    scale = torch.tensor(1.0)
    off_diagonal = kernels.Mask(scale, torch.tensor(-18.0), 1000, 0, None, None, None, None)
    product = (features.image @ features.text.T).detach()
    sums = kernels.sigmoid(product, off_diagonal, own=torch.empty(64), dtype=torch.float32)
    logits = product.double() - 18.0
    assert abs(sums.loss - torch.log1p(logits.exp()).sum()) < 1e-5 * sums.loss
    assert abs(sums.gradient_sum - logits.sigmoid().sum()) < 1e-5 * sums.gradient_sum


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile_for_gpus_without_spilling_registers(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.loss.compiled_kernels", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4 * (1 + 2 + 2 + 1) + 1
    for name, registers, spilled in lines:
        assert int(spilled) == 0 and int(registers) <= 128, (name, registers, spilled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_cuda_gradients_equal_float64(kind, dtype):
    if kind is ClipLoss:
        exact = hard_features()
        want = gradients(clip_loss(exact), exact)
    else:
        exact = draw(1500, scale=10.0, bias=-10.0)
        want = gradients(siglip_loss(exact), exact)
    short = Features(*(None if t is None else t.detach().float().cuda().requires_grad_() for t in exact))
    world = World(device=torch.device("cuda", 0))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = kind(world=world, tile=(512, 700))(short)["contrastive_loss"]
    got = [t.cpu() for t in gradients(loss, short)]
    assert worst_error(got, want) < (1e-5 if dtype is torch.float32 else 5e-3)
