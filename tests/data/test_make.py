"""Making shards from folders, read back with webdataset and with the training stream."""

import io
import itertools
import warnings

import numpy as np
import pytest
import webdataset
from PIL import Image

from clip_train.data.shards.make import make_shards
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.data.source import expand_shards, open_source
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.data.made import encoded, picture, stream
from tests.data.test_decode import _png_header_of


def _pairs(folder, count: int):
    for i in range(count):
        path = folder / f"group{i % 3}" / f"picture {i}.v1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
        path.with_suffix(".txt").write_text(f"n {i}")
    return folder


def _read(folder) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the collector
        return [
            s for shard in expand_shards(str(folder)) for s in webdataset.WebDataset(str(shard), shardshuffle=False)
        ]


def test_webdataset_reads_back_every_pair_in_shuffled_order(tmp_path):
    summary = make_shards(_pairs(tmp_path / "in", 25), tmp_path / "out", samples_per_shard=10)
    assert (summary.train, summary.val, summary.shards, summary.skipped) == (25, 0, 3, {})
    samples = _read(tmp_path / "out" / "train")
    numbers = [int(sample["txt"].split()[1]) for sample in samples]
    assert sorted(numbers) == list(range(25)) != numbers
    assert all(sample["png"] == encoded(picture(n)) for sample, n in zip(samples, numbers, strict=True))
    assert len({sample["__key__"] for sample in samples}) == 25


def test_the_training_stream_reads_what_was_made_and_checks_its_crcs(tmp_path):
    make_shards(_pairs(tmp_path / "in", 25), tmp_path / "out", samples_per_shard=10)
    batches = stream(tmp_path / "out" / "train", World(), batch=5).batches(0)
    assert all(batch.valid.all() for batch in itertools.islice(batches, 5))
    source = open_source(str(tmp_path / "out" / "train"), name="train", world=World(), field="x")
    flags = [np.fromfile(shard.idx_path, dtype="<u2").reshape(-1, 16)[:, 13] for shard in source.shards]
    assert np.all(np.concatenate(flags) == 1)


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    _pairs(tmp_path / "in", 9)
    for out in ("a", "b"):
        make_shards(tmp_path / "in", tmp_path / out, samples_per_shard=4, val=0.3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    assert not [f for f in files if f.suffix == ".part"]


def test_held_out_pictures_are_a_share_and_copies_stay_on_one_side(tmp_path):
    source = _pairs(tmp_path / "in", 200)
    for i in range(200):
        copy = source / f"copy{i}.png"
        copy.write_bytes(encoded(picture(i)))
        copy.with_suffix(".txt").write_text(f"n {i}")
    summary = make_shards(source, tmp_path / "out", val=0.25)
    assert summary.train + summary.val == 400 and 60 <= summary.val <= 140
    train, val = ({s["png"] for s in _read(tmp_path / "out" / side)} for side in ("train", "val"))
    assert not train & val


def test_what_cannot_be_used_is_counted_by_reason_and_left_out(tmp_path):
    source = _pairs(tmp_path / "in", 5)
    png = encoded(picture(0))
    contents = {"alone": png, "html": b"<html>", "cut": png[:300], "bomb": _png_header_of(30_000, 20_000), "blank": png}
    for name, content in contents.items():
        (source / f"{name}.png").write_bytes(content)
        (source / f"{name}.txt").write_text("" if name == "blank" else "a caption")
    (source / "alone.txt").unlink()
    (source / "a.JPG").write_bytes(encoded(picture(1), "JPEG"))
    (source / "a.txt").write_text("a photograph")
    (source / "a.cls").write_text("3")
    summary = make_shards(source, tmp_path / "out")
    assert summary.train == 6
    assert summary.skipped == {
        "caption_empty": 1, "caption_missing": 1, "too_many_pixels": 1, "undecodable": 1, "unknown_format": 1,
    }  # fmt: skip
    (photo,) = (s for s in _read(tmp_path / "out" / "train") if "jpg" in s)
    assert (photo["txt"], photo["cls"]) == (b"a photograph", b"3")


def test_resizing_shortens_the_short_side_and_never_enlarges(tmp_path):
    for name, size in {"wide": (90, 60), "tall": (40, 300), "small": (24, 20)}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(picture(0, size=size)))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    make_shards(tmp_path / "in", tmp_path / "out", resize=30)
    sizes = {s["txt"].decode(): Image.open(io.BytesIO(s["png"])).size for s in _read(tmp_path / "out" / "train")}
    assert sizes == {"wide": (45, 30), "tall": (30, 225), "small": (24, 20)}


def test_shards_are_never_overwritten_and_a_failed_set_has_no_index(tmp_path):
    sample = {"png": encoded(picture(0)), "txt": "x"}
    with ShardSetWriter(tmp_path / "a") as writer:
        writer.write("0", sample)
    with pytest.raises(UserError, match="already holds shards"):
        ShardSetWriter(tmp_path / "a")
    with pytest.raises(RuntimeError), ShardSetWriter(tmp_path / "b") as writer:
        writer.write("0", sample)
        raise RuntimeError
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["000000.tar.part"]


def test_a_folder_without_pictures_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        make_shards(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is not a folder"):
        make_shards(tmp_path / "nothing", tmp_path / "out")
