"""The arithmetic of the compiled CUDA tiles, uncompiled on the CPU; and the whole loss on CUDA where there is one."""

import pytest
import torch

from clip_train.distributed.world import World
from clip_train.loss import fused
from clip_train.loss.clip import ClipLoss
from clip_train.types import Features
from tests.loss.reference import clip_loss, draw, gradients, worst_error
from tests.loss.test_clip import MASKS, hard_features


@pytest.mark.parametrize("masks", MASKS)
def test_fused_tiles_equal_autograd_on_the_full_matrix(masks, monkeypatch):
    monkeypatch.setattr("clip_train.loss.clip.LogitTiles", fused.FusedLogitTiles)
    monkeypatch.setattr(fused, "_compiled", lambda function: function)
    features, masks = draw(96, scale=100.0), MASKS[masks](96)
    want = gradients(clip_loss(features, **masks), features)
    loss_fn = ClipLoss(world=World(), ignore_duplicates="ids" in masks, tile=(13, 50))
    loss = loss_fn(features, valid=masks.get("valid"), caption_ids=masks.get("ids"))["contrastive_loss"]
    assert worst_error(gradients(loss, features), want) < 1e-12


@pytest.mark.slow
def test_the_tile_functions_compile_without_graph_breaks():
    features, valid = draw(64, scale=100.0, dtype=torch.float32), MASKS["unequal"](64)["valid"]
    slots, bias = torch.arange(64), torch.zeros(64).masked_fill(~valid, -torch.inf)
    ids = slots * 7 % 20
    mask = fused.Mask(features.logit_scale.exp().detach(), slots, slots, bias, bias, ids, ids)
    product = (features.image @ features.text.T).detach()
    for got, want in zip(fused._compiled(fused.tile_sums)(product, mask), fused.tile_sums(product, mask), strict=True):
        assert all(torch.allclose(g, w, equal_nan=True) for g, w in zip(got, want, strict=True))
    lines = {"row_log_sum": slots + 5.0, "column_log_sum": slots + 6.0, "counted": 2.0 * valid, "dtype": torch.bfloat16}
    got = fused._compiled(fused.tile_gradient)(product, mask, **lines)
    assert torch.allclose(got.float(), fused.tile_gradient(product, mask, **lines).float(), atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gradients_equal_float64(dtype):
    exact = hard_features()
    want = gradients(clip_loss(exact), exact)
    short = Features(*(t.detach().float().cuda().requires_grad_() for t in exact[:3]), None)
    world = World(device=torch.device("cuda", 0))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = ClipLoss(world=world, tile=(512, 700))(short)["contrastive_loss"]
    got = [t.cpu() for t in gradients(loss, short)]
    assert worst_error(got, want) < (1e-5 if dtype is torch.float32 else 5e-3)
