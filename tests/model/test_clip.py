import math

import pytest
import torch

from clip_train.errors import UserError
from clip_train.model.transformer import _attend
from clip_train.model.zoo import create_model
from clip_train.types import Features

from . import reference

LENGTHS = [2, 3, 16, 17, 24, 25, 33, 48, 49, 76, 77, 9]


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def small_model(**overrides):
    text = {"vocab_size": 200, **overrides.pop("text", {})}
    vision = {"image_size": 32, **overrides.pop("vision", {})}
    return create_model("tiny", seed=1, text=text, vision=vision, **overrides).double()


def random_pixels(n, size=32, seed=0):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ragged", ["buckets", "off"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_text_features_and_all_gradients_equal_full_padding(ragged, quick_gelu):
    model = small_model(ragged=ragged, quick_gelu=quick_gelu)
    tokens = reference.random_captions(LENGTHS, vocab_size=200)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = reference.encode_text(weights, tokens, heads=2, quick_gelu=quick_gelu)
    got = model.encode_text(tokens, normalize=False)
    assert relative_error(got, expected) < 1e-12
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(upstream)
    got.backward(upstream)
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "logit_")):
            assert relative_error(parameter.grad, weights[name].grad) < 1e-12, name


@pytest.mark.parametrize("overrides", [{}, {"quick_gelu": True}, {"vision": {"layer_scale": 0.5, "mlp_ratio": 3.3}}])
def test_image_features_and_all_gradients_equal_a_convolution_and_full_blocks(overrides):
    model = small_model(**overrides)
    images = reference.normalized(random_pixels(3))
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = reference.encode_image(weights, images, heads=2, quick_gelu=model.config.quick_gelu)
    got = model.encode_image(images, normalize=False)
    assert relative_error(got, expected) < 1e-12
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(upstream)
    got.backward(upstream)
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            assert relative_error(parameter.grad, weights[name].grad) < 1e-12, name


def test_raw_pixels_are_normalised_by_the_model():
    model = small_model().float()
    pixels = random_pixels(3)
    raw = model.encode_image(pixels)
    assert torch.allclose(raw, model.encode_image(reference.normalized(pixels).float()), atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
def test_pooled_features_are_those_that_are_projected(name):
    model = create_model(name, seed=1).eval()
    images = random_pixels(2, size=model.config.vision.image_size)
    tower = model.visual
    with torch.no_grad():
        pooled, projected = model.pool_image(images), model.encode_image(images, normalize=False)
        expected = pooled @ tower.proj if name == "tiny" else tower.attnpool.c_proj(pooled)
    assert pooled.shape[1] != projected.shape[1] and pooled.dtype == torch.float32
    torch.testing.assert_close(projected, expected)


def test_features_are_float32_and_of_unit_length_also_under_autocast():
    model = small_model().float()
    tokens = reference.random_captions(LENGTHS, vocab_size=200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(random_pixels(len(LENGTHS)), tokens)
    for rows in (features.image, features.text):
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(LENGTHS)), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_a_short_type_is_exact_up_to_rounding_its_inputs_and_results(causal):
    torch.manual_seed(0)
    short = [torch.randn(3, 2, 20, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in short]
    hidden = torch.full((20, 20), -torch.inf, dtype=torch.float64).triu(1) if causal else torch.zeros(())
    q, k, v = exact
    expected = (q @ k.transpose(-1, -2) / 4 + hidden).softmax(dim=-1) @ v
    with torch.autocast("cpu", torch.bfloat16):
        found = _attend(*short, causal=causal)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert found.dtype == torch.bfloat16
    for ours, reference_values in [(found, expected), *((s.grad, e.grad) for s, e in zip(short, exact, strict=True))]:
        torch.testing.assert_close(ours.double(), reference_values, rtol=2**-8, atol=1e-5)


def test_on_text_runs_between_the_towers_and_replaces_the_text_features():
    model = small_model()
    tokens = reference.random_captions([5, 9], vocab_size=200)
    events = []
    model.visual.register_forward_hook(lambda *_: events.append("image"))

    def on_text(text):
        events.append("text")
        return 2 * text

    features = model(random_pixels(2), tokens, on_text)
    assert isinstance(features, Features) and events == ["text", "image"]
    assert torch.equal(features.text, 2 * model.encode_text(tokens))
    assert features.logit_scale is model.logit_scale and features.logit_bias is None


@pytest.mark.parametrize("ragged", ["buckets", "off"])
def test_a_caption_does_not_depend_on_its_neighbours(ragged):
    model = small_model(ragged=ragged)
    tokens = reference.random_captions(LENGTHS, vocab_size=200)
    together = model.encode_text(tokens)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert relative_error(model.encode_text(tokens[order]), together[order]) < 1e-12
    alone = torch.cat([model.encode_text(row[None]) for row in tokens])
    assert relative_error(alone, together) < 1e-12


def test_captions_are_read_at_the_first_end_token():
    model = small_model()
    tokens = reference.random_captions([5, 9], vocab_size=200)
    expected = model.encode_text(tokens)
    tokens[:, 20] = 199
    assert torch.equal(model.encode_text(tokens), expected)


def test_padding_wider_than_the_context_is_dropped_and_text_in_it_refused():
    model = small_model(text={"context_length": 12})
    tokens = reference.random_captions([5, 12], vocab_size=200)
    assert relative_error(model.encode_text(tokens), model.encode_text(tokens[:, :12])) < 1e-12
    with pytest.raises(UserError, match="context of 12 tokens"):
        model.encode_text(reference.random_captions([5, 13], vocab_size=200))


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient_and_saves_activations(every):
    tokens, pixels = reference.random_captions(LENGTHS, vocab_size=200), random_pixels(len(LENGTHS))
    gradients, saved = [], []
    for checkpointing in (0, every):
        model = small_model(checkpointing=checkpointing, vision={"layers": 4}, text={"layers": 4})
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = model(pixels, tokens)
        (features.image @ features.text.T).logsumexp(1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        saved.append(count)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert saved[1] < 0.8 * saved[0]


def test_patch_dropout_drops_the_stated_share_in_training_only():
    model = small_model(patch_dropout=0.6, vision={"patch_size": 8})
    images = reference.normalized(random_pixels(5)).requires_grad_()
    model.encode_image(images, normalize=False).sum().backward()
    seen = images.grad.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4)) > 0
    assert seen.sum((1, 2)).tolist() == [6] * 5  # of 16 patches
    assert not all(torch.equal(seen[0], other) for other in seen[1:])
    whole = small_model(vision={"patch_size": 8})
    assert torch.equal(model.eval().encode_image(images), whole.encode_image(images))


def test_patches_keep_their_positions_under_dropout(monkeypatch):
    model = small_model(patch_dropout=0.5, vision={"patch_size": 8})
    everything = torch.arange(16).flip(0).expand(3, -1)
    monkeypatch.setattr(model.visual, "_kept_patches", lambda patches: everything)
    pixels = random_pixels(3)
    assert relative_error(model.encode_image(pixels), model.eval().encode_image(pixels)) < 1e-12


def test_logit_scale_stays_between_1_and_100():
    model = small_model()
    assert model.logit_scale.shape == () and math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    for start, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(start)
        model.clamp_logit_scale_()
        assert math.isclose(model.logit_scale.item(), expected, rel_tol=1e-12)


def test_a_bias_exists_only_when_the_config_starts_one():
    assert small_model(init_logit_bias=-10.0).logit_bias.item() == -10
    assert "logit_bias" not in small_model().state_dict()


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = create_model("tiny", seed=3).state_dict(), create_model("tiny", seed=3).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["visual.proj"], create_model("tiny", seed=4).state_dict()["visual.proj"])


def test_initial_spreads_are_those_of_openai_clip():
    weights = create_model("tiny", seed=0).state_dict()
    width, layers = 128, 2
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        "transformer.resblocks.1.attn.in_proj_weight": width**-0.5,
        "transformer.resblocks.1.attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5,
        "transformer.resblocks.1.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "visual.proj": width**-0.5,
        "visual.positional_embedding": width**-0.5,
        "visual.class_embedding": width**-0.5,
        "visual.transformer.resblocks.1.attn.in_proj_weight": (2 / (4 * width)) ** 0.5,  # Glorot
    }
    for key, std in expected.items():
        assert math.isclose(weights[key].std().item(), std, rel_tol=0.15), key
    for key, value in weights.items():
        assert torch.isfinite(value).all(), key
