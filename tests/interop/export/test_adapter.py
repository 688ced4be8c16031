"""The adapters of a run: merged in the folder, by themselves in peft's format."""

import json

import pytest
import torch
from safetensors.torch import load_file

import clip_train
from clip_train.interop.export.folder import write_transformers
from clip_train.interop.transformers import matrix_names
from clip_train.model.config import LoraConfig
from clip_train.model.finetune import prepare
from clip_train.model.zoo import model_config
from clip_train.tokenizer.bpe import ClipTokenizer
from tests.interop import files
from tests.interop.export.test_export import export
from tests.interop.export.test_refuse import EVERYWHERE
from tests.interop.test_load import write_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The base model in transformers' layout, and the export of a run that adapted it."""
    root = tmp_path_factory.mktemp("adapters")
    base = files.small_model(**EVERYWHERE)
    (root / "base").mkdir()
    write_transformers(root / "base", config=base.config, tensors=base.state_dict(), tokenizer=ClipTokenizer())
    adapted = files.small_model(**EVERYWHERE, lora=LoraConfig(rank=2, alpha=6.0), init="the base")
    prepare(adapted, seed=0)
    with torch.no_grad():
        adapted.logit_scale.fill_(3.25)
        for i, name in enumerate(name for name, _ in adapted.named_parameters() if "lora_B" in name):
            torch.nn.init.normal_(adapted.get_parameter(name), std=0.1, generator=torch.Generator().manual_seed(i))
    write_run(root / "run", adapted)
    assert export(root / "run") == 0
    return root / "base", root / "run" / "export"


def test_the_base_plus_the_products_of_the_adapter_is_the_merged_export(exported):
    base, out = exported
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 2, "the base")
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    tensors, merged = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert len(config["target_modules"]) == 2 * (3 + 1 + 2) and len(factors) == 2 * len(config["target_modules"])
    for module in config["target_modules"]:
        up, down = (factors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "BA")
        tensors[f"{module}.weight"] += config["lora_alpha"] / config["r"] * up @ down
    tensors["logit_scale"] = torch.tensor(3.25)
    assert tensors.keys() == merged.keys()
    assert max((tensors[name] - merged[name]).abs().max() for name in merged) < 1e-6
    card = (out / "README.md").read_text()
    assert "logit_scale.data.fill_(3.250000)" in card and "PeftModel.from_pretrained(CLIPModel" in card


def test_a_fused_matrix_of_siglips_image_tower_is_three_there():
    names = ["visual.trunk.blocks.3.attn.qkv.weight", "transformer.resblocks.0.mlp.c_fc.weight"]
    there = "vision_model.encoder.layers.3.self_attn"
    assert matrix_names(model_config("ViT-B-16-SigLIP"), names) == {
        names[0]: [f"{there}.{part}_proj.weight" for part in "qkv"],
        names[1]: ["text_model.encoder.layers.0.mlp.fc1.weight"],
    }


@pytest.mark.slow
def test_peft_puts_the_adapter_on_the_base_and_computes_what_the_merged_model_does(exported):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, out = exported
    theirs = peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained(base), out / "adapter").eval()
    theirs.base_model.model.logit_scale.data.fill_(3.25)
    ours, _ = clip_train.load(out, device="cpu")
    plain, _ = clip_train.load(base, device="cpu")
    pixels, tokens = torch.randn(3, 3, 32, 32), ours.tokenize(["a cat", "two dogs on a beach", "x"])
    with torch.no_grad():
        found = theirs(input_ids=tokens, pixel_values=pixels)
        image, text = ours.encode_image(pixels), ours.encode_text(tokens)
        assert (found.image_embeds - image).abs().max() < 1e-5 and (found.text_embeds - text).abs().max() < 1e-5
        assert (found.logits_per_image - ours(pixels, tokens)[0]).abs().max() < 1e-3
        assert (plain.encode_image(pixels) - image).abs().max() > 1e-3
