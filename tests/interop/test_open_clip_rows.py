"""Every row against open_clip's own modules, where they are installed: weights in through `load`, and out again."""

import json

import pytest
import torch

import clip_train
from clip_train.interop.open_clip import second_layout, translate, write_config
from clip_train.model.clip import CLIP
from clip_train.model.zoo import model_config
from tests.model import reference
from tests.model.test_zoo import ZOO

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
TINY = {
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16, "head_width": 64},
        "text_cfg": TEXT,
    },
    "tiny-rn": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": TEXT,
    },
    "tiny-siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 64, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        },
    },
}  # fmt: skip
TINY["tiny with QuickGELU"] = {**TINY["tiny"], "quick_gelu": True}
PUBLISHED = [name for name in ZOO if not name.startswith("tiny")]
SHALLOW = ("ViT-H-14", "ViT-g-14", "ViT-bigG-14")


def their_config(name):
    config = TINY.get(name) or open_clip.get_model_config(name)
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):  # say which ids, not which tower
        config["text_cfg"].pop(key, None)
    return config


def their_model(config):
    config = dict(config)
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    return kind(**config).eval()


def spread(weights):
    """Move biases and gains off 0 and 1, where they start, so that a swapped one shows; keep variances positive."""
    return {
        k: v + 0.02 * torch.rand_like(v) if v.is_floating_point() and v.ndim == 1 else v for k, v in weights.items()
    }


def assert_equal_features(ours, theirs):
    size, config = ours.visual.input_resolution, ours.config
    pixels = torch.randn(2, 3, size, size)
    tokens = reference.random_captions(
        [5, config.text.context_length], context_length=config.text.context_length, vocab_size=config.text.vocab_size
    )
    with torch.no_grad():
        image = theirs.encode_image(pixels, normalize=True)
        text = theirs.encode_text(tokens, normalize=True)
        assert (ours.encode_image(pixels) - image).abs().max() < 1e-5
        assert (ours.encode_text(tokens) - text).abs().max() < 1e-5


def assert_in_and_out(config, folder):
    """open_clip's random weights through a folder and `load`; then this library's random weights into open_clip."""
    torch.manual_seed(0)
    theirs = their_model(config)
    theirs.load_state_dict(spread(theirs.state_dict()))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
    ours, _ = clip_train.load(folder, device="cpu")
    (folder / "open_clip_pytorch_model.bin").unlink()
    assert_equal_features(ours, theirs)
    fresh = ours.config.build(seed=7).eval()
    weights = spread(fresh.state_dict())
    fresh.load_state_dict(weights)
    write_config(folder / "open_clip_config.json", config=fresh.config)
    theirs = their_model(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    theirs.load_state_dict(second_layout(weights) if fresh.config.has_second_layout else weights, strict=True)
    assert_equal_features(fresh, theirs)


@pytest.mark.parametrize("name", [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)])
def test_features_of_a_row_agree_in_both_directions(name, tmp_path):
    config = their_config(name)
    if name in SHALLOW:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    assert_in_and_out(config, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_is_what_open_clip_calls_by_its_name(name):
    translated = translate(their_config(name), {}, name=name, origin=name)
    row = model_config(name)
    assert (translated.vision, translated.text, translated.embed_dim) == (row.vision, row.text, row.embed_dim)
    assert translated.quick_gelu == row.quick_gelu and translated.init_logit_bias == row.init_logit_bias


@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_keys_and_shapes_of_the_largest_rows_agree_at_full_depth(name):
    with torch.device("meta"):
        theirs, ours = their_model(their_config(name)), CLIP(model_config(name))
    expected = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "quick_gelu"),
    [
        ({"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}, True),
        ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "timm_proj_bias": True}, False),
        ({"timm_model_name": "test_efficientnet", "timm_pool": "rot_attn", "timm_proj": "none"}, False),
        ({"timm_model_name": "test_efficientnet", "timm_pool": "abs_attn", "timm_proj": "linear"}, False),
        ({"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True}, False),
        ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "mlp"}, False),
    ],
)
def test_timm_towers_agree_with_every_pooling_and_projection(vision, quick_gelu, tmp_path):
    config = {"embed_dim": 128, "quick_gelu": quick_gelu, "vision_cfg": {"image_size": 160, **vision}, "text_cfg": TEXT}
    assert_in_and_out(config, tmp_path)


@pytest.mark.parametrize(
    "style",
    [
        {"no_causal_mask": True, "pool_type": "argmax"},
        {"no_causal_mask": False, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}},
        {"pool_type": "eos", "eos_id": 7, "mlp_ratio": 3.3},
    ],
)
def test_text_towers_agree_in_every_style(style, tmp_path):
    config = {**TINY["tiny"], "text_cfg": {**TEXT, "vocab_size": 200, **style}}
    torch.manual_seed(0)
    theirs = their_model(config)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours, _ = clip_train.load(tmp_path, device="cpu")
    tokens = reference.random_captions([5, 9, 77], vocab_size=200)
    tokens[:, 3] = 7
    with torch.no_grad():
        assert (ours.encode_text(tokens) - theirs.encode_text(tokens, normalize=True)).abs().max() < 1e-5
