"""Making shards from folders, read back with webdataset and with the training stream."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from clip_train.data.config import DataConfig
from clip_train.data.shards.inputs.pair import InputOptions
from clip_train.data.shards.make import MakeOptions, make_shards
from clip_train.data.shards.preview import preview_pairs
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.data.source import expand_shards, open_source
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.data.made import encoded, numbered_shards, picture, stream, write_shard
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
    summary = make_shards(_pairs(tmp_path / "in", 25), tmp_path / "out", options=MakeOptions(samples_per_shard=10))
    assert (summary.train, summary.val, summary.shards, summary.skipped) == (25, 0, 3, {})
    samples = _read(tmp_path / "out" / "train")
    numbers = [int(sample["txt"].split()[1]) for sample in samples]
    assert sorted(numbers) == list(range(25)) != numbers
    assert all(sample["png"] == encoded(picture(n)) for sample, n in zip(samples, numbers, strict=True))
    assert len({sample["__key__"] for sample in samples}) == 25


def test_the_training_stream_reads_what_was_made_and_checks_its_crcs(tmp_path):
    make_shards(_pairs(tmp_path / "in", 25), tmp_path / "out", options=MakeOptions(samples_per_shard=10))
    batches = stream(tmp_path / "out" / "train", World(), batch=5).batches(0)
    assert all(batch.valid.all() for batch in itertools.islice(batches, 5))
    source = open_source(str(tmp_path / "out" / "train"), name="train", world=World(), field="x")
    flags = [np.fromfile(shard.idx_path, dtype="<u2").reshape(-1, 16)[:, 13] for shard in source.shards]
    assert np.all(np.concatenate(flags) == 1)


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    _pairs(tmp_path / "in", 9)
    for out in ("a", "b"):
        make_shards(tmp_path / "in", tmp_path / out, options=MakeOptions(samples_per_shard=4, val=0.3))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    assert not [f for f in files if f.suffix == ".part"]


def test_held_out_pictures_are_a_share_and_copies_stay_on_one_side(tmp_path):
    source = _pairs(tmp_path / "in", 200)
    for i in range(200):
        copy = source / f"copy{i}.png"
        copy.write_bytes(encoded(picture(i)))
        copy.with_suffix(".txt").write_text(f"n {i}")
    summary = make_shards(source, tmp_path / "out", options=MakeOptions(val=0.25))
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
    (source / "a.JFIF").write_bytes(encoded(picture(1), "JPEG"))
    (source / "a.TXT").write_text("a photograph")
    (source / "a.cls").write_text("3")
    summary = make_shards(source, tmp_path / "out")
    assert summary.train == 6
    assert summary.skipped == {
        "caption_empty": 1, "caption_missing": 1, "too_many_pixels": 1, "undecodable": 1, "unknown_format": 1,
    }  # fmt: skip
    (photo,) = (s for s in _read(tmp_path / "out" / "train") if "jpg" in s)
    assert (photo["txt"], photo["cls"]) == (b"a photograph", b"3")


def test_nothing_below_a_folder_is_lost_without_a_word(tmp_path):
    source = _pairs(tmp_path / "in", 3)
    (source / "linked").symlink_to(_pairs(tmp_path / "elsewhere", 4))
    (source / "linked" / "back").symlink_to(source)
    for name in ("photo.heic", ".hidden.png", ".checkpoints/old.png", "b\udce9d.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"no picture that we read")
        (source / name).with_suffix(".txt").write_text("a caption")
    summary = make_shards(source, tmp_path / "out")
    assert (summary.train, summary.skipped) == (7, {"image_missing": 1, "unknown_format": 1})
    assert summary.examples == {"image_missing": ["photo.txt"], "unknown_format": ["b\udce9d.png"]}
    assert "(not read: 1 .heic)" in str(summary)


def test_samples_of_shards_without_a_picture_are_counted(tmp_path):
    samples = [{"__key__": "0", "png": encoded(picture(0)), "txt": b"x"}, {"__key__": "1", "heic": b"", "txt": b"x"}]
    samples.append({"__key__": "2", "JFIF": encoded(picture(1), "JPEG"), "TXT": b"y"})
    write_shard(tmp_path / "in" / "x.tar", samples)
    summary = make_shards(tmp_path / "in", tmp_path / "out")
    assert (summary.train, summary.examples) == (2, {"image_missing": ["x.tar/1"]})


def test_photographs_with_a_second_picture_inside_are_stored_as_the_jpegs_they_are(tmp_path):
    content = encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(content)
    (tmp_path / "in" / "a.txt").write_text("from a phone")
    make_shards(tmp_path / "in", tmp_path / "out")
    (sample,) = _read(tmp_path / "out" / "train")
    assert sample["jpg"] == content


def test_resizing_shortens_the_short_side_and_never_enlarges(tmp_path):
    for name, size in {"wide": (90, 60), "tall": (40, 300), "small": (24, 20)}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(picture(0, size=size)))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    make_shards(tmp_path / "in", tmp_path / "out", options=MakeOptions(resize=30))
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
    with pytest.raises(UserError, match="local files only"):
        make_shards(Path("s3://bucket/pictures"), tmp_path / "out")
    with pytest.raises(UserError, match="is not a folder"):
        make_shards(tmp_path / "nothing", tmp_path / "out")


def _pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(number)))
    return folder


ROWS = [("a.png", "a red kite"), ("b/c.png", 'a "quoted", cat'), ("d.png", "Übung\nzwei")]


def _table(path, *, image="filepath", caption="title"):
    records = [{"id": str(n), image: name, caption: text} for n, (name, text) in enumerate(ROWS)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", image, caption], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("columns", [("filepath", "title"), ("bild", "text drunter")])
def test_tables_give_the_pictures_they_name_with_their_captions(tmp_path, suffix, columns):
    _pictures(tmp_path, [name for name, _ in ROWS])
    table = _table(tmp_path / f"t{suffix}", image=columns[0], caption=columns[1])
    if columns[0] == "bild":
        with pytest.raises(UserError, match="its columns are 'id', 'bild', 'text drunter': pass --image-col"):
            make_shards(table, tmp_path / "out")
    make_shards(
        table, tmp_path / "out", input_options=InputOptions(image_col=columns[0], caption_col=columns[1])
    )  # fmt: skip
    written = {sample["txt"].decode(): sample["png"] for sample in _read(tmp_path / "out" / "train")}
    assert written == {text: encoded(picture(number)) for number, (_, text) in enumerate(ROWS)}


def test_rows_of_one_picture_become_one_sample_with_all_its_captions(tmp_path):
    _pictures(tmp_path, ["a.png"])
    (tmp_path / "t.csv").write_text("Image, Caption\na.png,one\na.png,two\na.png,one\n")
    summary = make_shards(tmp_path / "t.csv", tmp_path / "out")
    (sample,) = _read(tmp_path / "out" / "train")
    assert (summary.train, sample["txt"], json.loads(sample["json"])) == (1, b"one", {"captions": ["one", "two"]})
    config = DataConfig(train=str(tmp_path / "out" / "train"), caption="json:captions")
    (source,) = config.open_train(world=World())
    assert source.num_samples == 1


def _coco(folder, *, split="val2017"):
    _pictures(folder / split, ["1.png", "2.png", "3.png"])
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (1, 2, 3)],
        "annotations": [{"image_id": n, "id": 10 * n + k, "caption": f"n {n}.{k} "} for k in range(2) for n in (1, 2)],
    }
    (folder / "annotations").mkdir()
    path = folder / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps(document))
    return path


def test_coco_captions_find_their_pictures_and_keep_all_captions(tmp_path):
    summary = make_shards(_coco(tmp_path), tmp_path / "out")
    assert (summary.train, summary.skipped, summary.examples) == (
        2,
        {"caption_missing": 1},
        {"caption_missing": ["3.png"]},
    )
    captions = {s["txt"].decode(): json.loads(s["json"])["captions"] for s in _read(tmp_path / "out" / "train")}
    assert captions == {"n 1.0": ["n 1.0", "n 1.1"], "n 2.0": ["n 2.0", "n 2.1"]}


def test_captions_that_are_null_are_none(tmp_path):
    path = _coco(tmp_path)
    document = json.loads(path.read_text())
    document["annotations"].append({"image_id": 3, "caption": None})
    path.write_text(json.dumps(document))
    assert make_shards(path, tmp_path / "out").skipped == {"caption_missing": 1}


def test_folders_of_classes_are_captioned_by_a_template(tmp_path):
    _pictures(tmp_path / "in", ["great_owl/1.png", "great_owl/sub/2.png", "ant/3.png", ".bee/4.png"])
    with pytest.raises(UserError, match=r"ant/3\.txt; .*--template"):
        make_shards(tmp_path / "in", tmp_path / "out")
    options = InputOptions(template="a photo of a {}.")
    assert "(2 classes)" in str(make_shards(tmp_path / "in", tmp_path / "out", input_options=options))
    written = sorted((s["cls"], s["txt"]) for s in _read(tmp_path / "out" / "train"))
    owl = (b"1", b"a photo of a great owl.")
    assert written == [(b"0", b"a photo of a ant."), owl, owl]


def test_shards_of_img2dataset_are_shuffled_and_split_anew_with_their_metadata(tmp_path):
    numbered_shards(tmp_path / "in", [4, 5])
    write_shard(tmp_path / "in" / "x.tar", [{"__key__": "0", "jpg": b"cut", "txt": b"t", "json": b"{}"}])
    (tmp_path / "in" / "x.parquet").write_bytes(b"")
    options = MakeOptions(samples_per_shard=6)
    summary = make_shards(tmp_path / "in", tmp_path / "out", options=options)
    assert (summary.train, summary.shards, summary.skipped) == (9, 2, {"unknown_format": 1})
    numbers = [int(s["txt"].split()[1]) for s in _read(tmp_path / "out" / "train")]
    assert sorted(numbers) == list(range(9)) != numbers


INPUT_MISTAKES = [
    ("t.csv", "image,caption\n", {}, "holds no rows"),
    (
        "t.csv",
        "image,caption\na.png,x\n",
        {"caption_col": "alt"},
        "no column 'alt'; its columns are 'image', 'caption'",
    ),
    ("t.csv", "image,caption\na.png,x\n", {"template": "a {}"}, "--template means nothing for a table"),
    ("t.csv", "image,caption\nhttps://x.org/a.png,x\n", {}, "fetch the pictures first"),
    ("t.csv", "image,caption\n,x\n", {}, "no row names a picture: column 'image' must hold paths of files, not ''"),
    ("t.csv", "image,caption\nno.png,x\n", {}, r"1 image_missing; the first is .*no\.png"),
    ("t.csv", "image;caption\na.png;x\n", {}, "its columns are 'image;caption'"),
    ("t.csv", "image,caption\na.png,a cat, asleep\n", {}, "line 2 has more fields than the 2 columns"),
    ("t.tsv", 'image\tcaption\na.png\t"open\na.png\tx\n', {}, "line 3: unexpected end of data"),
    ("t.tsv", 'image\tcaption\na.png\t"open\na.png\t"a" cat\n', {}, "line 3: .* a text that begins with a quote"),
    ("t.jsonl", "[" * 100_000, {}, "line 1 is not JSON"),
    ("t.jsonl", '{"image": "a.png", "text": "x"}\n{"image"\n', {}, "line 2 is not JSON"),
    ("t.jsonl", '{"image": "a.png", "text": 3}\n', {}, "none of 1 pictures can be used: 1 caption_not_text"),
    (
        "t.json",
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
        {},
        "caption",
    ),
    (
        "t.json",
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 7, "caption": "x"}]}',
        {},
        "1 captions are of pictures that `images` lacks, such as 7",
    ),
    ("t.json", '{"images": [{"id": 1, "file_name": "no.png"}], "annotations": []}', {}, "pass --images FOLDER"),
    ("t.parquet", "no parquet", {}, "cannot be read as parquet"),
    ("t.xlsx", "", {}, "is none of the inputs"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), INPUT_MISTAKES)
def test_inputs_that_cannot_be_read_are_user_errors_that_say_what_is_wrong(tmp_path, name, content, options, message):
    _pictures(tmp_path, ["a.png"])
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_shards(tmp_path / name, tmp_path / "out", input_options=InputOptions(**options))
    assert not list(tmp_path.glob("out/**/*.tar"))


def test_rows_of_a_table_that_cannot_be_used_are_left_out_by_name_and_the_others_are_made(tmp_path):
    _pictures(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "t.csv").write_text("image,caption\n,x\na.png," + "x" * 200_000 + "\nb.png,x\n")
    summary = make_shards(tmp_path / "t.csv", tmp_path / "of_csv")
    assert (summary.train, summary.skipped) == (1, {"caption_too_long": 1, "image_missing": 1})
    cells = [("a.png", ["one", 7]), ("", "x"), (None, "x"), ("b.png", 3), (["c.png"], "x"), ("c.png", None)]
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in cells]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    summary = make_shards(tmp_path / "t.jsonl", tmp_path / "out", options=MakeOptions(shuffle=False))
    assert (summary.train, _read(tmp_path / "out" / "train")[0]["txt"]) == (1, b"one")
    rows = [f"row {number} of t.jsonl" for number in (2, 3, 5)]
    assert summary.examples == {
        "image_missing": rows, "caption_not_text": ["b.png"], "caption_missing": ["c.png"],
    }  # fmt: skip


def test_a_failed_attempt_leaves_nothing_that_a_corrected_one_would_believe(tmp_path):
    _pictures(tmp_path / "images", ["a.png"])
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
    with pytest.raises(UserError, match="image_missing"):
        make_shards(tmp_path / "t.csv", tmp_path / "out")
    options = InputOptions(images=tmp_path / "images")
    assert make_shards(tmp_path / "t.csv", tmp_path / "out", input_options=options).train == 1


def test_a_dry_run_shows_pairs_and_writes_nothing(tmp_path):
    _pictures(tmp_path, [name for name, _ in ROWS])
    table = _table(tmp_path / "t.csv")
    (tmp_path / "d.png").unlink()
    text = preview_pairs(table, options=MakeOptions(), input_options=InputOptions())
    assert "t.csv is a table (.csv): 3 pictures" in text
    assert "caption  a red kite" in text and "left out: image_missing" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b", "t.csv"]


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _PowerCut(BaseException):
    pass


@pytest.mark.parametrize("cut", [1, 2, 5, 7])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, cut):
    _pairs(tmp_path / "in", 21)
    options = MakeOptions(val=0.3, samples_per_shard=4)
    make_shards(tmp_path / "in", tmp_path / "whole", options=options)
    steps = itertools.count(1)

    def interrupt(*_):
        if next(steps) == cut:
            raise _PowerCut

    with pytest.raises(_PowerCut):
        make_shards(tmp_path / "in", tmp_path / "out", options=options, progress=interrupt)
    with pytest.raises(UserError, match=r"val 0\.3 -> 0\.1"):
        make_shards(tmp_path / "in", tmp_path / "out", options=MakeOptions(val=0.1, samples_per_shard=4))
    make_shards(tmp_path / "in", tmp_path / "out", options=options)
    assert _content(tmp_path / "out") == _content(tmp_path / "whole")


@pytest.mark.slow
def test_runs_killed_at_any_moment_continue_to_the_same_bytes_with_several_processes(tmp_path):
    _pairs(tmp_path / "in", 3000)
    options = ["--val", "0.1", "--shard-size", "100", "--resize", "16"]
    make_shards(
        tmp_path / "in", tmp_path / "whole", options=MakeOptions(val=0.1, samples_per_shard=100, resize=16)
    )  # fmt: skip
    command = [sys.executable, "-m", "clip_train", "shards", "make", str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    for pattern, number in ((".making/examined-*.json", 1), ("*/*.tar", 1), ("*/*.tar", 9), ("*/*.tar", 20)):
        process = subprocess.Popen([*command, *options, "--jobs", "2"], env=environment, start_new_session=True)
        while len(list((tmp_path / "out").glob(pattern))) < number:
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, *options, "--jobs", "2"], env=environment, check=True)
    assert _content(tmp_path / "out") == _content(tmp_path / "whole")
