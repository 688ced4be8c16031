import torch
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from clip_train.model.modified_resnet import AttentionPool, Bottleneck
from clip_train.model.zoo import create_model

from . import reference


def test_an_unstrided_bottleneck_equals_torchvisions():
    ours, theirs = Bottleneck(32, 8, stride=1).double(), TorchvisionBottleneck(32, 8).double()
    torch.nn.init.normal_(ours.bn3.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 32, 8, 8, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)


def test_the_attention_pool_equals_torchs_multi_head_attention():
    pool = AttentionPool(3, 64, heads=4, embed_dim=16).double()
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    tokens = x.flatten(2).permute(2, 0, 1)  # [h * w, B, C]
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        tokens[:1], tokens, tokens, 64, 4, None, torch.cat([p.bias for p in (pool.q_proj, pool.k_proj, pool.v_proj)]),
        None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
        need_weights=False,
    )  # fmt: skip
    assert torch.allclose(pool(x), expected[0], atol=1e-12)


def test_raw_pixels_are_normalised_by_the_model_and_gradients_reach_every_parameter():
    model = create_model("tiny-rn", seed=0).eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw = model.encode_image(pixels)
    assert torch.allclose(raw, model.encode_image(reference.normalized(pixels).float()), atol=1e-5)
    model.train().encode_image(pixels, normalize=False).square().sum().backward()
    assert all(p.grad is not None for p in model.visual.parameters())
