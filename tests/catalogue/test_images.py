"""Catalogue of bad input, items 34 to 45: pictures. One run sees them all; its ledger tells which it could not use."""

import json
import os
import re
import signal

import numpy as np
import pytest
from PIL import Image

from clip_train.data.config import DataConfig
from clip_train.data.images.decode import features
from clip_train.data.images.transforms import TrainTransform
from tests.catalogue.commands import clip_train, train
from tests.data.made import encoded, numbered_shards, picture, write_shard
from tests.data.test_check import BAD_SAMPLES, GOOD_PICTURES, JPEG, PNG, _text_bomb

catalogue = pytest.mark.catalogue
slow = pytest.mark.slow


def progressive_bomb(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: 30 bytes each, and each a pass over all its pixels."""
    content = encoded(Image.new("RGB", (64, 64), "teal"), "JPEG", progressive=True)
    start, end = content.rfind(b"\xff\xda"), content.rfind(b"\xff\xd9")
    return content[:end] + content[start:end] * scans + content[end:]


def _transparent_palette() -> bytes:
    return encoded(picture(5).convert("P"), transparency=3)


def _animated(image_format: str, **options) -> bytes:
    frames = [picture(value) for value in (6, 7, 8)]
    return encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)


# key -> (extension, content, reason)
BAD = {key: (row[0], row[1], row[3]) for key, row in BAD_SAMPLES.items() if not row[3].startswith("caption_")} | {
    "html_as_webp": ("webp", b"<html>", "unknown_format"),
    "psd": ("png", b"8BPS\0\1" + bytes(50), "unknown_format"),
    "eps": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "unknown_format"),
    "jxl": ("jpg", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "unknown_format"),
    "too_tall": ("png", encoded(picture(1, size=(16, 5000))), "too_narrow"),
    "zip": ("png", _text_bomb(), "unknown_format"),
    "scans": ("jpg", progressive_bomb(200), "too_many_scans"),
}
GOOD = {key: row[:2] for key, row in GOOD_PICTURES.items()} | {
    "png_named_jpg": ("jpg", PNG),
    "jpeg_named_webp": ("webp", JPEG),
    "transparent_palette": ("png", _transparent_palette()),
    "sixteen_bit": ("png", encoded(Image.fromarray(np.full((20, 20), 40_000, np.uint16)))),
    "animated_webp": ("webp", _animated("WEBP")),
    "apng": ("png", _animated("PNG", default_image=False)),
    "progressive": ("jpg", encoded(picture(9), "JPEG", progressive=True)),
}
if features.check("avif"):
    GOOD["avif"] = ("avif", encoded(picture(1), "AVIF"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command that trained on all of them for an epoch, and the reasons in its ledger by key."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = {**BAD, **{key: (*row, None) for key, row in GOOD.items()}}
    samples = [{"__key__": key, ext: content, "txt": key.encode()} for key, (ext, content, _) in rows.items()]
    write_shard(folder / "shards" / "a.tar", samples)
    done = train(
        folder / "shards", folder / "run", f"global_batch_size={len(rows) // 2}", "steps=3",
        "data.max_bad_fraction=1", "data.on_bad=mask",
    )  # fmt: skip
    lines = (folder / "run" / "bad" / "rank-000.jsonl").read_text().splitlines()
    ledger = {row["key"].partition("/")[2].rpartition(".")[0]: row["reason"] for row in map(json.loads, lines)}
    return done, ledger


@slow
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(["empty_image", "html", "svg", "html_as_webp", "psd", "eps"], marks=catalogue(34)),
        pytest.param(["cut_jpeg", "cut_png", "flipped_png"], marks=catalogue(35)),
        pytest.param(["one_pixel", "narrow", "too_tall"], marks=catalogue(40)),
        pytest.param(["bomb"], marks=catalogue(41)),
        pytest.param(["zip"], marks=catalogue(42)),
        pytest.param(["heic", "jxl"], marks=catalogue(43)),
        pytest.param(["scans"], marks=catalogue(45)),
    ],
)
def test_a_picture_that_cannot_be_used_keeps_its_place_and_is_counted_by_reason(run, keys):
    done, ledger = run
    assert {key: ledger.get(key) for key in keys} == {key: BAD[key][2] for key in keys}
    done.worked("samples that could not be used", *(BAD[key][2] for key in keys), "run/bad")


@slow
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(["png_named_jpg", "jpeg_named_webp"], marks=catalogue(34)),
        pytest.param(
            ["cmyk", "grey", "grey_alpha", "alpha", "palette", "transparent_palette", "one_bit"], marks=catalogue(36)
        ),
        pytest.param(["grey16", "sixteen_bit", "float"], marks=catalogue(37)),
        pytest.param(["rotated"], marks=catalogue(38)),
        pytest.param(["animated", "animated_webp", "apng"], marks=catalogue(39)),
        pytest.param(["broken_profile"], marks=catalogue(44)),
        pytest.param(["progressive"], marks=catalogue(45)),
    ],
)
def test_an_unusual_picture_is_used(run, keys):
    done, ledger = run
    done.worked()
    assert set(ledger) == set(BAD)
    assert set(keys) <= set(GOOD)


@slow
@catalogue(43)
def test_a_picture_without_codec_is_explained_once_a_shard_is_checked(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "heic", "jpg": BAD["heic"][1], "txt": b"words"}])
    done = clip_train("shards", "check", tmp_path, "--jobs", 1, "--batch-size", 1)
    assert (done.code, "Traceback" in done.err) == (3, False)
    assert re.search(r"a\.tar heic: .*HEIC", done.out), done.out


class ActsOnOne(TrainTransform):
    """Does to its process what a broken decoder does, at one picture."""

    def __call__(self, content, *, uniforms, out):
        if content == encoded(picture(17)):
            self.act()
        super().__call__(content, uniforms=uniforms, out=out)


class Hangs(ActsOnOne):
    def act(self):
        while True:
            pass


class Crashes(ActsOnOne):
    def act(self):
        os.kill(os.getpid(), signal.SIGSEGV)


@slow
@catalogue(45)
@pytest.mark.parametrize(("transform", "reason"), [(Hangs, "too_slow"), (Crashes, "decoder_crashed")])
def test_a_picture_that_ends_its_worker_is_tried_apart_and_counted_by_itself(tmp_path, monkeypatch, transform, reason):
    numbered_shards(tmp_path / "shards", [60])
    monkeypatch.setattr(DataConfig, "transform", lambda self, *, image_size: transform(image_size=image_size))
    done = train(tmp_path / "shards", tmp_path / "run", "data.workers=1", "steps=5", "data.max_bad_fraction=1")
    done.worked("a loader worker failed", f"1 {reason}", "run/bad")
    row = json.loads((tmp_path / "run" / "bad" / "rank-000.jsonl").read_text())
    assert (row["key"], row["reason"]) == ("s-000.tar/0017.png", reason)
