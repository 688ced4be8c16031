import copy
import os
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import clip_train
from clip_train.errors import UserError
from clip_train.interop.pictures import Preprocess

from . import files


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = files.small_model(quick_gelu=True)
    path = tmp_path_factory.mktemp("model") / "mine.pt"
    torch.save({**model.state_dict(), **files.openai_integers(model)}, path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return clip_train.load(path, device="cpu")[0]


def pictures(count=5):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8) for _ in range(count)]


def test_encode_gives_the_features_of_one_call_each_in_their_order(model, tmp_path):
    arrays = pictures()
    images = [Image.fromarray(array) for array in arrays]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    one_by_one = torch.cat([model.encode_image(model.preprocess(image)[None]) for image in images]).detach().numpy()
    for given in (images, arrays, [tmp_path / f"{i}.png" for i in range(5)], (image for image in images)):
        features = model.encode(images=given, batch_size=2, progress=False)
        assert features.dtype == np.float32 and np.abs(features - one_by_one).max() < 1e-6
    preprocessed = torch.stack([model.preprocess(image) for image in images])
    assert np.abs(model.encode(images=preprocessed, batch_size=2) - one_by_one).max() < 1e-6
    assert copy.deepcopy(model).double().encode(images=images).dtype == np.float32
    texts = ["a cat", "a dog in a house", "", "three"]
    one_by_one = torch.cat([model.encode_text([text], normalize=False) for text in texts]).detach().numpy()
    assert np.abs(model.encode(texts=texts, batch_size=3, normalize=False) - one_by_one).max() < 1e-5
    for column in (np.array(texts), iter(texts)):
        assert np.abs(model.encode(texts=column, batch_size=3, normalize=False) - one_by_one).max() < 1e-5
    nothing = (model.encode(texts=[]), model.encode(images=iter([])), model.encode_text([]))
    size = model.visual.input_resolution
    assert all(
        v.shape == (0, model.config.embed_dim) for v in (*nothing, model.encode_image(torch.ones(0, 3, size, size)))
    )


def test_encode_holds_one_batch_of_an_iterator_at_a_time(model, monkeypatch):
    drawn, held = [], []
    encode_text = type(model).encode_text
    monkeypatch.setattr(type(model), "encode_text", lambda *a, **k: held.append(len(drawn)) or encode_text(*a, **k))
    model.encode(texts=(drawn.append(i) or "a" for i in range(6)), batch_size=2)
    assert held == [2, 4, 6]


def test_one_object_that_is_given_again_with_other_contents_is_read_each_time(model, tmp_path):
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 90, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as film:
        features = model.encode(images=ImageSequence.Iterator(film), progress=False)
    assert np.abs(features - model.encode(images=frames, progress=False)).max() < 1e-6
    buffer, values = np.zeros((32, 32, 3), np.uint8), (0, 90, 255)
    reused = (np.copyto(buffer, value) or buffer for value in values)
    assert np.array_equal(model.encode(images=reused, progress=False), features)


def test_files_are_decoded_by_several_threads_that_leave_warnings_as_they_were(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    expected = model.encode(images=pictures(12), progress=False)
    two_at_once, preprocess = threading.Barrier(2, timeout=60), Preprocess.__call__
    monkeypatch.setattr(Preprocess, "__call__", lambda self, image: (two_at_once.wait(), preprocess(self, image))[1])
    for i, array in enumerate(pictures(12)):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    filters = list(warnings.filters)
    assert np.array_equal(model.encode(images=[tmp_path / f"{i}.png" for i in range(12)], batch_size=64), expected)
    assert threading.active_count() == 1 and warnings.filters == filters


def test_encode_cuts_long_captions_only_when_told(model):
    long = "word " * 100
    with pytest.raises(RuntimeError, match="truncate=True"):
        model.encode(texts=[long])
    cut = model.tokenize([long], truncate=True)
    assert np.abs(model.encode(texts=[long], truncate=True) - model.encode_text(cut).detach().numpy()).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "images=… or texts=…"),
        ({"images": [], "texts": []}, "one of them"),
        ({"texts": "a cat"}, "put a single one into a list"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size=0"),
        ({"images": [np.zeros((4, 4), dtype=np.uint8)]}, r"uint8 \[4, 4\] is no picture"),
        ({"images": ["absent.png"]}, "absent.png: No such file"),
        ({"images": [__file__]}, r"test_encode\.py: "),
        ({"images": ["https://x.org/a.png"]}, "a.png: a URL"),
        ({"images": [b"bytes"]}, "bytes is no picture"),
        ({"images": [torch.ones(3, 5, 5)]}, r"tensor torch.float32 \[3, 5, 5\] is no picture"),
        ({"images": Image.new("RGB", (9, 9))}, "put a single one into a list"),
        ({"images": np.zeros((9, 9, 3), dtype=np.uint8)}, "put a single one into a list"),
        ({"texts": ["a", float("nan")]}, "nan is no caption"),
        ({"texts": ["long " * 900]}, "'long .{40,59}… has 902 tokens"),
    ],
)
def test_encode_refuses_what_it_cannot_embed(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.encode(**arguments)


def test_a_picture_cut_short_is_named(model, tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.png: image file is truncated"):
        model.encode(images=[tmp_path / "a.png"])
    expected = pytest.raises(UserError, match=r"picture 1: image file is truncated")
    with Image.open(tmp_path / "a.png") as cut, expected:
        model.encode(images=[Image.new("RGB", (9, 9)), cut], batch_size=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(3, 32, 32), r"\[3, 32, 32\]"),
        (torch.ones(32, 32), r"\[32, 32\]"),  # once taken for features
        (torch.ones(1, 3, 48, 48), r"stacked to \[B, 3, 32, 32\]"),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), r"raw pixels uint8 \[B, 32, 32, 3\]"),
        (Image.new("RGB", (32, 32)), "not Image: stack what preprocess returns"),
    ],
)
def test_images_of_another_shape_are_told_the_right_one(model, images, message):
    with pytest.raises(UserError, match=message):
        model.encode_image(images)
    with pytest.raises(UserError, match="give \\[n, L\\]"):
        model.encode_text(model.tokenize("a")[0])
    with pytest.raises(UserError, match="preprocess takes a PIL image, not str"):
        model.preprocess("a.png")


def test_the_bar_is_drawn_on_terminals_only(model, capsys, monkeypatch):
    model.encode(texts=["a"] * 9, batch_size=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model.encode(texts=["a"] * 9, batch_size=2)
    shown = capsys.readouterr()
    assert "texts" in shown.err and "9/9" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_precision_is_chosen_by_name_and_the_temperature_keeps_it(path, model, name, dtype):
    loaded, _ = clip_train.load(path, device="cpu", dtype=name)
    assert loaded.dtype == dtype and loaded.logit_scale.dtype == torch.float32
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    assert (loaded.encode(texts=["a dog"]) * model.encode(texts=["a dog"])).sum() > 0.999
    with pytest.raises(UserError, match="dtype='int8' must be one of fp32, bf16, fp16"):
        clip_train.load(path, dtype="int8")


def test_another_image_size_interpolates_the_positions_and_says_so(path, model, capsys):
    loaded, preprocess = clip_train.load(path, device="cpu", image_size=48)
    assert "2x2 -> 3x3" in capsys.readouterr().err
    assert loaded.visual.input_resolution == 48 and preprocess(Image.new("RGB", (60, 50))).shape == (3, 48, 48)
    same, table = model.visual.positional_embedding, loaded.visual.positional_embedding
    assert torch.equal(same[0], table[0]) and table.shape == (10, same.shape[1])
    image = preprocess(Image.fromarray(pictures()[0]))
    assert loaded.encode_image(image[None]).norm().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="image_size=50"):
        clip_train.load(path, image_size=50)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_features(path, model):
    compiled, _ = clip_train.load(path, device="cpu", compile=True)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    images = pictures()
    assert np.abs(compiled.encode(images=images) - model.encode(images=images)).max() < 1e-5
    assert np.abs(compiled.encode(texts=["a", "a dog"]) - model.encode(texts=["a", "a dog"])).max() < 1e-5
