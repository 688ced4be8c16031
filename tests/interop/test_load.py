import json
import pickle
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import clip_train
from clip_train.checkpoint.best import Score, write_best
from clip_train.checkpoint.checkpointer import Checkpointer
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.manifest import MANIFEST_NAME, Manifest
from clip_train.checkpoint.state import ModelState
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.files import hash_file

from . import files


def same_weights(loaded, model, *, half=False):
    theirs = loaded.state_dict()
    return theirs.keys() == model.state_dict().keys() and all(
        torch.equal(theirs[name], tensor.half().float() if half else tensor)
        for name, tensor in model.state_dict().items()
    )


def random_picture(width=97, height=61, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def weight_file(tmp_path):
    model = files.small_model(quick_gelu=True)
    path = tmp_path / "mine.pt"
    torch.save({**model.state_dict(), **files.openai_integers(model)}, path)
    return path


def write_run(path, model, *, ema=None, state=None, **settings):
    text = OmegaConf.to_yaml(OmegaConf.create({"steps": 5, "model": OmegaConf.structured(model.config), **settings}))
    tensors = {"model": ModelState(model)} | ({} if ema is None else {"ema": ModelState(ema)})
    with Checkpointer(
        path, world=World(), config=CheckpointConfig(), tensors=tensors, state=state or {}
    ) as checkpointer:
        return checkpointer.save(step=5, consumed=40, config_yaml=text)


def test_the_tutorial_snippet_runs_unchanged_and_gives_cosines(weight_file):
    import clip_train as clip

    device = "cpu"
    model, preprocess = clip.load(weight_file, device=device)
    image = preprocess(random_picture()).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 3) and np.isclose(probs.sum(), 1)
    cosines = torch.nn.functional.cosine_similarity(image_features, text_features)
    assert torch.allclose(logits_per_image[0], model.logit_scale.exp() * cosines, atol=1e-4)
    assert torch.equal(logits_per_text, logits_per_image.T)


def test_the_loaded_model_has_openais_attributes(weight_file):
    model, _ = clip_train.load(weight_file, device="cpu")
    assert model.visual.input_resolution == 32
    assert (model.context_length, model.vocab_size, model.dtype) == (77, 49408, torch.float32)
    assert not model.training and model.logit_bias is None
    assert torch.equal(model.tokenize(["a dog"]), clip_train.tokenize("a dog"))
    assert torch.equal(
        model.encode_text(["a dog", "a cat"]), model.encode_text(clip_train.tokenize(["a dog", "a cat"]))
    )
    raw = model.encode_text("a dog", normalize=False)
    assert torch.allclose(raw / raw.norm(), model.encode_text("a dog")) and not torch.isclose(
        raw.norm(), torch.tensor(1.0)
    )


def test_parameters_take_the_requested_type(weight_file):
    model, preprocess = clip_train.load(weight_file, device="cpu", dtype=torch.bfloat16)
    exact, _ = clip_train.load(weight_file, device="cpu")
    image = preprocess(random_picture())[None]
    assert model.dtype == torch.bfloat16 and model.encode_image(image).dtype == torch.float32
    assert (model.encode_image(image) * exact.encode_image(image)).sum() > 0.999
    assert (model.encode_text("a dog") * exact.encode_text("a dog")).sum() > 0.999


def test_an_openai_archive_loads_with_its_activation(tmp_path):
    model = files.small_model()
    files.write_torchscript(model, tmp_path / "ViT-tiny.pt")
    loaded, _ = clip_train.load(tmp_path / "ViT-tiny.pt", device="cpu")
    assert same_weights(loaded, model, half=True) and loaded.dtype == torch.float32
    assert loaded.config.quick_gelu and loaded.config.vision.heads == 2


def test_a_resnet_loads_from_an_archive_and_a_folder(tmp_path):
    small = {"text": {"width": 64, "heads": 1, "layers": 1}}
    model = clip_train.create_model("tiny-rn", seed=3, **small, vision={"resnet_stages": [2, 1, 1, 2]}).eval()
    files.write_torchscript(model, tmp_path / "RN.pt")
    loaded, _ = clip_train.load(tmp_path / "RN.pt", device="cpu")
    assert same_weights(loaded, model, half=True) and loaded.config.vision == model.config.vision
    folder = files.write_open_clip_folder(model, tmp_path / "folder")
    loaded, preprocess = clip_train.load(folder, device="cpu")
    assert same_weights(loaded, model) and loaded.config.vision == model.config.vision
    image = preprocess(random_picture())[None]
    assert torch.allclose(loaded.encode_image(image), model.encode_image(image), atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_training_checkpoints_of_other_libraries_load_by_architecture_name(tmp_path, suffix, prefix):
    model = clip_train.create_model("tiny", seed=2)
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    tensors[prefix + "logit_scale"] = tensors[prefix + "logit_scale"].reshape(1)
    path = tmp_path / f"epoch_1{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 1, "name": "x", "state_dict": tensors, "optimizer": {"state": {}}}, path)
    else:
        save_file(tensors, path)
    loaded, _ = clip_train.load(f"tiny:{path}", device="cpu")
    assert same_weights(loaded, model)
    with pytest.raises(UserError, match=f"as in ViT-B-32:{path}"):
        clip_train.load(path)


def test_an_architecture_and_a_file_contradict_openais_archive_and_a_folder_that_tell_it(tmp_path, weight_file):
    with pytest.raises(UserError, match=rf"tiny:{weight_file} means quick_gelu=false, but .* records the opposite"):
        clip_train.load(f"tiny:{weight_file}")
    folder = files.write_open_clip_folder(files.small_model(), tmp_path / "small")
    with pytest.raises(UserError, match=rf"open_clip_config.json tells the architecture; load {folder}$"):
        clip_train.load(f"tiny:{folder}/open_clip_model.safetensors")
    with pytest.raises(UserError, match=rf"a folder tells its architecture itself; load {folder}$"):
        clip_train.load(f"tiny:{folder}")


def test_the_second_key_layout_loads_too(tmp_path):
    model = clip_train.create_model("tiny", seed=2)
    text_keys = ("positional_embedding", "text_projection", "token_embedding", "ln_final", "transformer")
    tensors = {f"text.{k}" if k.startswith(text_keys) else k: v for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "custom.safetensors")
    assert same_weights(clip_train.load(f"tiny:{tmp_path}/custom.safetensors", device="cpu")[0], model)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_an_open_clip_folder_loads_with_its_own_normalisation(tmp_path, weights):
    model = files.small_model(vision={"image_size": 32, "heads": 4})
    folder = files.write_open_clip_folder(model, tmp_path / "export", weights=weights)
    loaded, preprocess = clip_train.load(folder, device="cpu")
    assert same_weights(loaded, model) and loaded.config.vision.heads == 4 and not loaded.config.quick_gelu
    white = preprocess(Image.new("RGB", (40, 40), "white"))
    assert torch.equal(white, torch.full((3, 32, 32), 2.0))


def test_how_an_open_clip_folder_resizes_pictures_is_kept_or_refused(tmp_path):
    folder = files.write_open_clip_folder(files.small_model(), tmp_path / "export")
    config = folder / "open_clip_config.json"
    values = json.loads(config.read_text())
    for mode, expected in (("shortest", False), ("squash", True)):
        values["preprocess_cfg"] |= {"resize_mode": mode, "interpolation": "bicubic"}
        config.write_text(json.dumps(values))
        model, preprocess = clip_train.load(folder, device="cpu")
        assert model.config.squash is preprocess.squash is expected
    for key, value in (("resize_mode", "longest"), ("interpolation", "bilinear")):
        config.write_text(json.dumps({**values, "preprocess_cfg": {key: value}}))
        with pytest.raises(UserError, match=f"preprocess_cfg.{key}='{value}'"):
            clip_train.load(folder)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"timm_model_name": "test_convnext", "timm_pool": "avgmax"}, "timm_pool='avgmax'"),
        ({"qk_norm": True}, "qk_norm"),
    ],
)
def test_an_open_clip_model_with_other_parts_is_refused(tmp_path, field, message):
    folder = files.write_open_clip_folder(files.small_model(), tmp_path / "export", **field)
    with pytest.raises(UserError, match=f"no counterpart for model_cfg.vision_cfg.{message}"):
        clip_train.load(folder)


def test_weights_of_another_shape_are_listed(tmp_path):
    tensors = clip_train.create_model("tiny").state_dict()
    tensors["visual.proj"] = torch.zeros(128, 32)
    tensors["extra"] = tensors.pop("visual.class_embedding")
    save_file(tensors, tmp_path / "x.safetensors")
    message = (
        r"not those of tiny: 1 missing \(visual.class_embedding\); 1 unexpected \(extra\); "
        r"1 of another shape \(visual.proj \[128, 32\], not \[128, 64\]\)"
    )
    with pytest.raises(UserError, match=message):
        clip_train.load(f"tiny:{tmp_path}/x.safetensors")


def test_a_run_and_its_checkpoint_load_their_average_unless_raw_is_asked_for(tmp_path):
    model, average = files.small_model(seed=1), files.small_model(seed=2)
    checkpoint = write_run(tmp_path / "run", model, ema=average)
    for path in (tmp_path / "run", str(checkpoint)):
        assert same_weights(clip_train.load(path, device="cpu")[0], average)
        assert same_weights(clip_train.load(path, device="cpu", weights="ema")[0], average)
        assert same_weights(clip_train.load(path, device="cpu", weights="raw")[0], model)


def test_a_run_without_average_loads_its_weights(tmp_path):
    model = files.small_model()
    write_run(tmp_path / "run", model)
    assert same_weights(clip_train.load(tmp_path / "run", device="cpu")[0], model)
    with pytest.raises(UserError, match="weights=ema, but the run keeps no moving average"):
        clip_train.load(tmp_path / "run", weights="ema")
    with pytest.raises(UserError, match="no best checkpoint"):
        clip_train.load(tmp_path / "run", weights="best")
    with pytest.raises(UserError, match="weights='last' must be one of auto, ema, raw, best"):
        clip_train.load(tmp_path / "run", weights="last")


def test_the_best_checkpoint_is_loaded_rather_than_the_newest(tmp_path):
    models = {step: files.small_model(seed=step) for step in (5, 10)}
    config = OmegaConf.to_yaml(OmegaConf.create({"model": OmegaConf.structured(models[5].config)}))
    for step, model in models.items():
        tensors = {"model": ModelState(model)}
        with Checkpointer(tmp_path, world=World(), config=CheckpointConfig(), tensors=tensors, state={}) as writer:
            writer.save(step=step, consumed=8 * step, config_yaml=config)
    write_best(tmp_path, Score(step=5, metric="val/acc1", value=0.5))
    assert same_weights(clip_train.load(tmp_path, device="cpu", weights="best")[0], models[5])
    assert same_weights(clip_train.load(tmp_path, device="cpu")[0], models[10])


def test_a_checkpoint_of_sharded_tensors_loads_like_a_whole_one(tmp_path):
    model = files.small_model()
    checkpoint = write_run(tmp_path, model, ema=files.small_model(seed=1))
    for part in ("model", "ema"):
        tensors = load_file(checkpoint / f"{part}.safetensors")
        rows = {name: (0, (len(t) + 1) // 2, len(t)) for name, t in tensors.items() if t.ndim}
        first = {name: t[: rows[name][1]] if t.ndim else t for name, t in tensors.items()}
        second = {name: tensors[name][half:] for name, (_, half, count) in rows.items() if half < count}
        places = [{n: [0, rows[n][2]] for n in rows}, {n: [rows[n][1], rows[n][2]] for n in second}]
        for i, chunk in enumerate((first, second)):
            metadata = {"format": "pt", "rows": json.dumps(places[i])}
            save_file(chunk, checkpoint / f"{part}-{i + 1:05d}-of-00002.safetensors", metadata=metadata)
        (checkpoint / f"{part}.safetensors").unlink()
    manifest = Manifest.read(checkpoint)
    records = {path.name: hash_file(path) for path in checkpoint.iterdir() if path.name != MANIFEST_NAME}
    (checkpoint / MANIFEST_NAME).write_bytes(replace(manifest, files=records).to_bytes())
    assert same_weights(clip_train.load(tmp_path, device="cpu", weights="raw")[0], model)
    assert same_weights(clip_train.load(tmp_path, device="cpu")[0], files.small_model(seed=1))


def test_best_are_the_weights_that_its_metric_was_measured_on(tmp_path):
    raw, averaged = files.small_model(seed=1), files.small_model(seed=2)
    config = OmegaConf.to_yaml(OmegaConf.create({"model": OmegaConf.structured(raw.config)}))
    tensors = {"model": ModelState(raw), "ema": ModelState(averaged)}
    with Checkpointer(tmp_path, world=World(), config=CheckpointConfig(), tensors=tensors, state={}) as writer:
        writer.save(step=5, consumed=8, config_yaml=config)
    for metric, model in (("val/acc1", raw), ("-val_ema/rank", averaged)):
        write_best(tmp_path, Score(step=5, metric=metric, value=0.5))
        assert same_weights(clip_train.load(tmp_path, device="cpu", weights="best")[0], model)


def test_an_export_loads_with_the_architecture_that_its_record_tells(tmp_path):
    model = files.small_model(text={"width": 128, "heads": 4, "layers": 1}, quick_gelu=True)
    folder = files.write_open_clip_folder(model, tmp_path / "export")
    (folder / "open_clip_config.json").unlink()
    (folder / "clip_train.json").write_text(json.dumps({"model": asdict(model.config), "calibration": None}))
    loaded, _ = clip_train.load(folder, device="cpu")
    assert same_weights(loaded, model) and loaded.config == model.config


def test_a_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = write_run(tmp_path / "run", files.small_model())
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(IntegrityError):
        clip_train.load(checkpoint)


def test_unreadable_files_are_one_line_errors(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a model")
    (tmp_path / "a.safetensors").write_bytes(b"not a model")
    torch.save({"nothing": 1}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(print))
    for name in ("a.pt", "a.safetensors", "b.pt", "c.pt"):
        with pytest.raises(UserError, match=name):
            clip_train.load(f"tiny:{tmp_path}/{name}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(UserError, match="open_clip"):
        clip_train.load(tmp_path / "folder")


def test_offline_and_absent_names_three_ways_out(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("CLIP_TRAIN_WEIGHTS", str(tmp_path))
    for name, repository in (("ViT-B/32", "timm/vit_base_patch32_clip_224.openai"), ("hf-hub:me/mine@v2", "me/mine")):
        with pytest.raises(UserError) as caught:
            clip_train.load(name, download_root=str(tmp_path / "cache"))
        for words in (name, repository, str(tmp_path), "pass its path", "set CLIP_TRAIN_WEIGHTS", "create_model"):
            assert words in str(caught.value)


def test_names_are_looked_up_in_the_weights_folder_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_TRAIN_WEIGHTS", str(tmp_path))
    model = files.small_model()
    files.write_open_clip_folder(model, tmp_path / "me-mine")
    assert same_weights(clip_train.load("hf-hub:me/mine", device="cpu")[0], model)
    quick = files.small_model(quick_gelu=True)
    torch.save({**quick.state_dict(), **files.openai_integers(quick)}, tmp_path / "ViT-B-32.pt")
    assert same_weights(clip_train.load("ViT-B/32", device="cpu")[0], quick)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-16", "an architecture, not weights"),
        ("ViT-B/33", "nearest names are ViT-B/32"),
        ("ViT-B-32:laion", "neither a file nor published weights; near it are ViT-B-32:laion"),
        ("tiny:weights.pt", "neither a file nor published weights; there is no such file"),
        (f"tny:{__file__}", "no architecture is named 'tny'; the nearest names are tiny"),
        ("runs/x", r"neither a path .*; available_models\(\) lists"),
        ("x" * 5000, "File name too long"),
        (None, "a NoneType is no model to load"),
    ],
)
def test_random_weights_are_never_loaded(name, message, monkeypatch):
    monkeypatch.delenv("CLIP_TRAIN_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=message):
        clip_train.load(name)


def test_a_weight_file_beside_its_config_names_the_folder(tmp_path):
    folder = files.write_open_clip_folder(files.small_model(), tmp_path / "small")
    with pytest.raises(UserError, match=rf"its folder does: load {folder}\. Its first keys"):
        clip_train.load(folder / "open_clip_model.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"load the run, .*run, or one of its checkpoints"):
        clip_train.load(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"as in ViT-B-32:.*open_clip_model.safetensors"):
        clip_train.load(shutil.copy(folder / "open_clip_model.safetensors", tmp_path))


def test_a_misspelt_path_names_its_neighbours(tmp_path):
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match=rf"nearest names are {tmp_path}/second$"):
        clip_train.load(tmp_path / "secnod")


def test_a_scripted_variant_is_refused(weight_file):
    with pytest.raises(UserError, match="jit=True"):
        clip_train.load(weight_file, jit=True)
