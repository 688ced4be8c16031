"""Shards made of parquet tables with the pictures inside, against the rows that were written into them."""

import itertools
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from clip_train.data.shards.inputs.pair import InputOptions
from clip_train.data.shards.inputs.parquet import pictures_of
from clip_train.data.shards.make import MakeOptions, make_shards
from clip_train.data.shards.preview import preview_pairs
from clip_train.errors import UserError
from tests.data.made import encoded, picture
from tests.data.test_make import _read

HUGGING_FACE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
KINDS = {"image": HUGGING_FACE, "jpg": pyarrow.binary(), "png": pyarrow.large_binary()}


def _table(path, numbers, *, column="image", rows_per_group=4, empty=()):
    """Write a table whose captions count; pictures of the numbers in `empty` are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [None if n in empty else encoded(picture(n)) for n in numbers]
    cells = [c and {"bytes": c, "path": f"{n}.png"} for n, c in zip(numbers, contents, strict=True)]
    columns = {
        "caption": pyarrow.array([[f"n {n}", f"other {n}"] if n % 2 else [f"n {n}"] for n in numbers]),
        column: pyarrow.array(cells if column == "image" else contents, KINDS[column]),
        "score": pyarrow.array([0.5] * len(numbers)),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


def _made(folder) -> dict[int, bytes]:
    return {int(sample["txt"].split()[1]): sample["png"] for sample in _read(folder)}


@pytest.mark.parametrize("column", KINDS)
def test_every_row_becomes_a_sample_with_its_bytes_and_captions(tmp_path, column):
    table = _table(tmp_path / "in" / "t.parquet", range(11), column=column, empty={3})
    summary = make_shards(table, tmp_path / "out", options=MakeOptions(samples_per_shard=4))
    assert (summary.train, summary.skipped) == (10, {"image_missing": 1})
    assert _made(tmp_path / "out" / "train") == {n: encoded(picture(n)) for n in range(11) if n != 3}
    assert summary.kind == "a table (.parquet) with the pictures inside"
    captions = {sample["txt"]: sample.get("json") for sample in _read(tmp_path / "out" / "train")}
    assert captions[b"n 5"] == b'{"captions": ["n 5", "other 5"]}' and captions[b"n 4"] is None
    assert not (tmp_path / "out" / ".making").exists()


def test_the_files_of_one_split_are_one_table_and_several_splits_are_refused(tmp_path):
    for i in range(2):
        _table(tmp_path / "in" / f"train-0000{i}-of-00002-ab12.parquet", range(5 * i, 5 * i + 5))
    shown = preview_pairs(tmp_path / "in", options=MakeOptions(shuffle=False), input_options=InputOptions())
    assert "a table (2 files .parquet) with the pictures inside: 10 pictures" in shown and "n 4" in shown
    _table(tmp_path / "in" / "test-00000-of-00001.parquet", range(20, 25))
    with pytest.raises(UserError, match=r"names 2 splits, test, train: choose one, as in '.*/train-\*\.parquet'"):
        make_shards(tmp_path / "in", tmp_path / "out")
    make_shards(tmp_path / "in" / "train-*.parquet", tmp_path / "out")
    assert sorted(_made(tmp_path / "out" / "train")) == list(range(10))


def test_an_interrupted_run_copies_no_row_group_twice_and_ends_with_the_same_bytes(tmp_path):
    source = tmp_path / "in"
    _table(source / "a.parquet", range(8))
    good = _table(source / "b.parquet", range(8, 16)).read_bytes()
    make_shards(source, tmp_path / "whole", options=MakeOptions(samples_per_shard=6))
    start = pyarrow.parquet.read_metadata(source / "b.parquet").row_group(1).column(1).data_page_offset
    (source / "b.parquet").write_bytes(good[:start] + b"\xff" * 40 + good[start + 40 :])
    with pytest.raises(UserError, match=r"b\.parquet: row group 1 cannot be read as parquet"):
        make_shards(source, tmp_path / "out", options=MakeOptions(samples_per_shard=6))
    copies = tmp_path / "out" / ".making"
    done = {path: path.stat().st_ino for path in copies.glob("pictures-*") if path.suffix != ".part"}
    assert {path.name for path in done if not path.suffix} == {f"pictures-00000{i}" for i in range(3)}
    (source / "b.parquet").write_bytes(good)
    seen = {}
    make_shards(
        source, tmp_path / "out", options=MakeOptions(samples_per_shard=6),
        progress=lambda what, *_: seen.setdefault(what, {p: p.stat().st_ino for p in done}),
    )  # fmt: skip
    assert seen["examined"] == done
    for path in (tmp_path / "whole" / "train").iterdir():
        assert (tmp_path / "out" / "train" / path.name).read_bytes() == path.read_bytes()


def test_a_row_group_of_many_pictures_is_never_in_memory_as_a_whole(tmp_path):
    contents = [bytes([n]) * 400_000 for n in range(60)]
    table = pyarrow.table({"png": pyarrow.array(contents), "text": pyarrow.array(["x"] * 60)})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, data_page_size=1 << 20, write_batch_size=2
    )
    del table, contents
    before = pyarrow.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    most = 0
    for n, content in zip(itertools.count(), pictures_of(path, column="png", row_group=0), strict=False):
        assert content is not None and (len(content), content[-1]) == (400_000, n)
        most = max(most, pyarrow.default_memory_pool().bytes_allocated() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert n == 59 and most < 12_000_000  # of 24 MB


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [1, 2], "text": ["a", "b"]}, {}, "column 'image' is of type int64; pictures are paths, bytes, or"),
        ({"image": [b"x"], "text": [3]}, {}, "column 'text' is of type int64; captions are texts or lists of texts"),
        ({"image": [b"x"], "text": ["a"]}, {"images": "."}, "--images means nothing for a table"),
        ({"text": ["a"]}, {}, "no column of images with a usual name"),
    ],
)
def test_tables_that_cannot_be_read_are_user_errors(tmp_path, columns, options, message):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=message):
        make_shards(path, tmp_path / "out", input_options=InputOptions(**options))
