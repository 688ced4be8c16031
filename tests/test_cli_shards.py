"""The shard commands hand their options on: each is used here once, from pictures to a page."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clip_train.cli import main
from clip_train.cli_shards import shards
from clip_train.data.bad import BadLedger, BadSample
from clip_train.data.index.files import HAS_CRC, RECORD, read_listing
from clip_train.errors import IntegrityError, UserError
from tests.data.made import encoded, numbered_shards, picture


def run(*arguments) -> str:
    done = CliRunner().invoke(shards, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def _table(folder: Path) -> Path:
    for n in range(12):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / f"{n}.png").write_bytes(encoded(picture(n, size=(60, 50))))
    rows = "".join(f"{n}.png;n {n};{n}\n" for n in range(12))
    path = folder / "table.csv"
    path.write_text("file;words;number\n" + rows + "13.png;no such file;13\n")
    return path


def test_make_takes_all_its_options(tmp_path):
    arguments = [
        "make", _table(tmp_path), tmp_path / "out", "--image-col", "file", "--caption-col", "words", "--sep", ";",
        "--images", tmp_path / "pictures", "--jobs", 1,
    ]  # fmt: skip
    shown = run(*arguments, "--dry-run", "--no-shuffle")
    assert "13 pictures" in shown and shown.count("caption  n ") == 5
    assert not (tmp_path / "out").exists()
    said = run(*arguments, "--val", 0.3, "--resize", 20, "--quality", 50, "--shard-size", 5, "--seed", 1)
    assert "1 left out: image_missing, such as 13.png" in said
    train, val = read_listing(tmp_path / "out" / "train"), read_listing(tmp_path / "out" / "val")
    counts = [entry.n for entry in train.values()]
    assert sum(counts) + sum(entry.n for entry in val.values()) == 12 and set(counts[:-1]) <= {5} and val
    document = json.loads(run("check", tmp_path / "out" / "train", "--json", "--jobs", 1, "--world", 9))
    assert (document["width"]["most"], document["height"]["most"]) == (24, 20)
    assert any("9 ranks x 2 workers" in warning for warning in document["warnings"])


def test_names_that_no_encoding_has_are_printed_escaped(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name, content in (("a.png", encoded(picture(1))), ("b\udce9d.png", b"")):
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["clip-train", "shards", "make", f"{tmp_path}/in", f"{tmp_path}/out", "--jobs=1"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    with pytest.raises(SystemExit, match="0"):
        main()
    sys.stdout.seek(0)
    assert "1 left out: empty_image, such as b\\udce9d.png" in sys.stdout.read()


def test_overlap_takes_all_its_options(tmp_path):
    numbered_shards(tmp_path / "train", [4, 5])
    numbered_shards(tmp_path / "set", [4])
    out = tmp_path / "found.csv"
    said = run(
        "overlap", tmp_path / "train", tmp_path / "set", "--out", out, "--distance", 4, "--likeness", 0.99, "--jobs", 1
    )
    assert "4 of 4 pictures (100.00%)" in said and "4 the same file" in said
    assert len(out.read_text().splitlines()) == 5
    with pytest.raises(UserError, match="cannot be written"):
        run("overlap", tmp_path / "train", tmp_path / "set", "--out", tmp_path, "--jobs", 1)


def test_make_captions_folders_of_classes(tmp_path):
    (tmp_path / "in" / "red_fox").mkdir(parents=True)
    (tmp_path / "in" / "red_fox" / "1.png").write_bytes(encoded(picture(1)))
    shown = run("make", tmp_path / "in", tmp_path / "out", "--template", "a photo of a {}", "--dry-run")
    assert "caption  a photo of a red fox" in shown


def test_index_takes_all_its_options(tmp_path):
    numbered_shards(tmp_path / "in", [4, 5])
    run("index", tmp_path / "in", "--crc", "--index-dir", tmp_path / "index", "--jobs", 1)
    (idx,) = (tmp_path / "index").rglob("s-001.idx")
    assert (np.fromfile(idx, dtype=RECORD)["flags"] == HAS_CRC).all()
    assert not list((tmp_path / "in").glob("*.idx"))
    (tmp_path / "run").mkdir()
    ledger = BadLedger(tmp_path / "run", rank=0)
    ledger.write([BadSample(0, "a", "s-000.tar", 1, "s-000.tar/0001.png", "undecodable", None)], step=1)
    ledger.write([BadSample(1, "b", "s-000.tar", 2, "s-000.tar/0002.png", "undecodable", None)], step=1)
    ledger.close()
    quarantine = ["--quarantine", tmp_path / "run" / "bad", "--source", "a"]
    said = run("index", tmp_path / "in", "--filter", "key!=0003", *quarantine, "--jobs", 1)
    assert "6 samples in 2 shards" in said
    assert "2 left out: not key!=0003" in said and "1 left out: quarantined, undecodable" in said
    path = tmp_path / "in" / "s-001.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(IntegrityError, match="cut off"):
        run("index", tmp_path / "in", "--jobs", 1)
    assert "used up to the cut" in run("index", tmp_path / "in", "--allow-truncated", "--jobs", 1)
    with pytest.raises(IntegrityError, match="no sample has both"):
        run("index", tmp_path / "in" / "s-000.tar", "--captions", "json")
    with pytest.raises(UserError, match="--source"):
        run("index", tmp_path / "in", "--source", "a")


def test_show_takes_all_its_options(tmp_path):
    numbered_shards(tmp_path / "in", [4, 5])
    arguments = ["--num", 3, "--seed", 2, "--image-size", 16, "--index-dir", tmp_path / "index", "--caption", "txt"]
    page = Path(run("show", tmp_path / "in", tmp_path / "a.html", *arguments).strip())
    text = page.read_text()
    assert "the first 3 of the training order with seed 2, at 16 px" in text and text.count("<article") == 3
    assert not list((tmp_path / "in").glob("*.idx"))
