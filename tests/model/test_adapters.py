"""Adapters (LoRA): what is trained, what they compute, against the formula written out."""

import sys

import pytest
import torch
from torch.func import functional_call

from clip_train.errors import UserError
from clip_train.model.adapters import split_adapters
from clip_train.model.config import LoraConfig
from clip_train.model.finetune import layers_above, places, prepare
from clip_train.model.zoo import create_model
from tests.model.test_finetune import inputs, model, prepared, trained

MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def with_random_adapters(made, *, seed=5):
    g = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=g)
    return made


def factors_of(made):
    """The trained tensors by the native name of their matrix, found by their place alone."""
    found = {}
    for tower in ("", "visual."):
        for i, block in enumerate(made.get_submodule(f"{tower}transformer.resblocks")):
            layers = (block.attn.in_proj, block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
            for matrix, layer in zip(MATRICES, layers, strict=True):
                name = f"{tower}transformer.resblocks.{i}.{matrix}"
                found[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return found


def test_adapters_start_as_nothing_and_only_they_and_the_temperature_train():
    plain, adapted = model(), prepared(lora={"rank": 2})
    for ours, theirs in zip(adapted(*inputs()), plain(*inputs()), strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs, atol=1e-6)
    factors = [factor for pair in factors_of(adapted).values() for factor in pair]
    want = {id(parameter) for parameter in [*factors, adapted.logit_scale]}
    assert {id(adapted.get_parameter(name)) for name in trained(adapted)} == want
    assert len(want) == 1 + 2 * len(MATRICES) * 6


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_features_gradients_and_merged_weights_are_those_of_the_sum_written_out(alpha):
    adapted = with_random_adapters(prepared(lora={"rank": 2, "alpha": alpha}))
    scale = 1.0 if alpha is None else alpha / 2
    plain, factors = model(), factors_of(adapted)
    leaves = {name: [f.detach().clone().requires_grad_() for f in pair] for name, pair in factors.items()}
    tensors = dict(plain.state_dict())
    summed = tensors | {name: tensors[name] + scale * up @ down for name, (down, up) in leaves.items()}
    left, adapters = split_adapters(adapted.state_dict(), config=adapted.config.lora)
    assert left.keys() == tensors.keys() and all(torch.equal(left[name], tensors[name]) for name in left)
    merged = adapters.merged_into(left)
    assert all(torch.allclose(merged[name], summed[name], atol=1e-7) for name in tensors)
    ours, want = adapted(*inputs()), functional_call(plain, summed, inputs())
    assert torch.allclose(ours.image, want.image, atol=1e-6) and torch.allclose(ours.text, want.text, atol=1e-6)
    assert not torch.allclose(ours.image, plain(*inputs()).image, atol=1e-2)
    for features in (ours, want):
        (features.image * features.text).sum().backward()
    for name, pair in factors.items():
        for ours, want in zip(pair, leaves[name], strict=True):
            assert torch.allclose(ours.grad, want.grad, rtol=1e-4, atol=1e-6), name


def test_adapters_follow_the_locks_the_seed_and_the_order_of_the_layers():
    chosen = {"vision": {"unlocked_blocks": 0}, "text": {"unlocked_blocks": 1}, "lora": {"rank": 2}}
    made, again = prepared(**chosen), prepared(**chosen)
    own = trained(made) - {"logit_scale"}
    assert len(own) == 8 and {places(made)[name].depth for name in own} == {3}
    assert not any(name.startswith("visual.") for name in own)
    assert {layers_above(made)[name] for name in own} == {1}
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    assert model().state_dict().keys() == split_adapters(made.state_dict(), config=made.config.lora)[0].keys()


@pytest.mark.slow
def test_a_block_with_adapters_compiles_whole():
    for block in with_random_adapters(prepared(lora={"rank": 2})).transformer.resblocks:
        arguments = (torch.randn(2, 12, 128), True)
        plain = block(*arguments)
        block.compile(fullgraph=True, backend="aot_eager")
        assert torch.allclose(block(*arguments), plain, atol=1e-6)


def test_the_blocks_of_a_timm_tower_are_adapted_alike():
    made = create_model("tiny-siglip", lora={"rank": 2})
    plain = create_model("tiny-siglip")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))
    prepare(made, seed=0)
    left, adapters = split_adapters(made.state_dict(), config=made.config.lora)
    assert left.keys() == plain.state_dict().keys()
    blocks = {f"visual.trunk.blocks.{i}" for i in range(6)}
    layers = {
        f"{block}.{layer}.weight" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {name for name in adapters.factors if name.startswith("visual.")} == layers


def test_what_cannot_be_adapted_is_named():
    made = create_model("tiny-rn", lora={"rank": 2})
    with pytest.raises(UserError, match=r"model\.lora\.rank=2: the vision tower has no transformer block"):
        prepare(made, seed=0)
    for wrong in ({"rank": -1}, {"alpha": 0.0}):
        name = next(iter(wrong))
        with pytest.raises(UserError, match=rf"model\.lora\.{name}="):
            LoraConfig(**wrong)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora\.rank needs peft: pip install 'clip-train\[lora\]'"):
        prepared(lora={"rank": 2})
