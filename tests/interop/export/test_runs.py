"""Runs of every kind on their way out: what other libraries compute is what the run computes."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clip_train
from clip_train.checkpoint.best import best_checkpoint
from clip_train.config import load
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.errors import UserError
from clip_train.evaluate import evaluate
from clip_train.train import train
from tests.interop.export.test_export import export

pytestmark = pytest.mark.slow
LONGER = [
    "steps=60",
    "evaluation.val.every=20",
    "checkpoint.every=20",
    "optim.lr=1e-3",
]  # past the collapse at the start
COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "black": (20, 20, 20),
    "white": (235,) * 3,
    "yellow": (230, 230, 20),
}
CAPTIONS = ["a red circle", "two blue squares on white", "a photo"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Plain colours and their names: learnt within a few dozen steps."""
    out, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for part, count in (("train", 120), ("val", 24)):
        with ShardSetWriter(out / part, samples_per_shard=120) as writer:
            for i in range(count):
                name, colour = list(COLOURS.items())[i % len(COLOURS)]
                pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                writer.write(f"{i:04d}", {"png": buffer.getvalue(), "txt": f"a picture of {name}, number {i}"})
    return out


def trained(scenes, run_dir, *more):
    train(
        load("train", [
            f"data.train={scenes}/train", f"data.val={scenes}/val", f"run_dir={run_dir}", "model=tiny", "device=cpu",
            "data.workers=0", "precision=fp32", "steps=6", "global_batch_size=12", "optim.warmup=1", "optim.lr=3e-3",
            "checkpoint.every=2", "evaluation=[val]", "evaluation.val.every=2", *more,
        ])
    )  # fmt: skip
    return run_dir


def features(model):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(model.tokenize(CAPTIONS)), pixels


def open_clip_features(folder, *, pixels, config):
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        return model.eval().encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def test_adapters_are_merged_into_the_weights_that_open_clip_reads(scenes, tmp_path):
    run = trained(scenes, tmp_path / "run", "model.lora.rank=2", "model.text.causal=true")
    model, _ = clip_train.load(run)
    image, text, pixels = features(model)
    assert export(run, out=tmp_path / "out") == 0
    theirs = open_clip_features(tmp_path / "out", pixels=pixels, config=model.config)
    assert (image - theirs[0]).abs().max() < 1e-5
    assert (text - theirs[1]).abs().max() < 1e-5
    names = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert not [name for name in names if "lora_" in name or "base_layer" in name]


def test_the_best_weights_are_those_of_the_best_checkpoint(scenes, tmp_path):
    run = trained(scenes, tmp_path / "run", "checkpoint.best=-val/image_retrieval_recall@1", *LONGER)
    saved = load_file(best_checkpoint(run) / "model.safetensors")
    assert export(run, weights="best", out=tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)


def test_without_its_bias_a_sigmoid_model_ranks_alike(scenes, tmp_path, capsys):
    bias = ["loss=siglip", "model.init_logit_bias=-10", "model.init_logit_scale=2.302585"]
    run = trained(scenes, tmp_path / "run", *bias)
    assert export(run, out=tmp_path / "refused") == 0
    assert "logit_bias" in capsys.readouterr().out
    assert not (tmp_path / "refused" / "config.json").exists()
    assert export(run, out=tmp_path / "out", drop_logit_bias=True) == 0
    import transformers

    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    model, _ = clip_train.load(run)
    image, text, pixels = features(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.mean, model.config.std))
    with torch.no_grad():
        logits = theirs(
            input_ids=model.tokenize(CAPTIONS), pixel_values=(pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        ).logits_per_image
    assert torch.equal(logits.argsort(dim=1), (image @ text.T).argsort(dim=1))
    assert (logits - model.logit_scale.exp() * image @ text.T).abs().max() < 1e-4


def test_a_matryoshka_model_is_evaluated_by_its_first_dimensions(scenes, tmp_path):
    run = trained(scenes, tmp_path / "run", "model.matryoshka=[16]", *LONGER)
    scores = evaluate(load("evaluate", [f"checkpoint={run}", "embed_dim=16", "device=cpu"]))
    result = json.loads((run / "evaluation" / "embed_dim-16" / "val.json").read_text())
    assert result["metrics"]["mean_recall@1"] == scores["val/mean_recall@1"]
    assert "first 16 of" in result["pretrained"]
    with pytest.raises(UserError, match="embed_dim=9999"):
        evaluate(load("evaluate", [f"checkpoint={run}", "embed_dim=9999", "device=cpu"]))


def test_blocks_of_a_timm_tower_compile_and_compute_the_same():
    from clip_train.config import load as load_config
    from clip_train.distributed.parallel import transformer_blocks

    config = load_config("train", [
        "steps=100", "optim.warmup=1", "data.train=x", "model=timm", "model.vision.timm=vit_tiny_patch16_224",
        "model.vision.image_size=64", "device=cpu",
    ]).model  # fmt: skip
    model = config.build(seed=0).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = model.encode_image(pixels)
        blocks = transformer_blocks(model)
        assert any("timm" in type(block).__module__ for block in blocks)
        for block in blocks:
            block.compile()
        assert (model.encode_image(pixels) - expected).abs().max() < 1e-5
