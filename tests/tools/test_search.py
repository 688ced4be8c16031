"""`clip-train search`: the nearest pictures, and an index that embeds each picture once."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import clip_train
from clip_train.errors import UserError
from clip_train.tools.search import EMBEDDINGS_FILE, INDEX_FOLDER, METADATA_FILE, PARQUET_FILE, update_index
from clip_train.tools.search_command import search_command
from tests.interop import files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return files.write_open_clip_folder(files.small_model(), tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def model(source):
    return clip_train.load(source, device="cpu")[0]


def write_picture(path, *, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 30)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write_picture(tmp_path / "pictures" / ("more" if i > 3 else "") / f"{i}.png", seed=i)
    return tmp_path / "pictures"


def search(query, folder, source, capsys, **options):
    code = search_command(str(query), folder, model=str(source), as_json=True, **options)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def by_hand(vector, paths, model):
    """Every picture embedded by itself: paths and cosines, best first."""
    cosines = {str(path): float(model.encode(images=[path])[0].astype(np.float64) @ vector) for path in paths}
    return sorted(cosines.items(), key=lambda item: -item[1])


def test_a_text_and_a_picture_find_what_comparing_one_by_one_finds(folder, source, model, capsys):
    paths = sorted(folder.rglob("*.png"))
    other = write_picture(folder.parent / "query.png", seed=4)
    for query, vector in (
        ("a red cross", model.encode(texts=["a red cross"])[0]), (other, model.encode(images=[other])[0]),
    ):  # fmt: skip
        code, rows = search(query, folder, source, capsys, top=4)
        expected = by_hand(vector, paths, model)[:4]
        assert code == 0 and [row["rank"] for row in rows] == [1, 2, 3, 4]
        assert [row["path"] for row in rows] == [path for path, _ in expected]
        assert np.allclose([row["cosine"] for row in rows], [cosine for _, cosine in expected], atol=1e-6)
    assert rows[0]["path"].endswith("4.png") and rows[0]["cosine"] == pytest.approx(1, abs=1e-6)


def test_only_what_is_new_is_embedded(folder, model):
    first = update_index(folder, model=model)
    assert (first.num_embedded, len(first.files)) == (6, 6)
    again = update_index(folder, model=model)
    assert again.num_embedded == 0 and np.array_equal(again.embeddings, first.embeddings)
    os.utime(folder / "0.png", ns=(1, 1))  # touched
    (folder / "1.png").rename(folder / "renamed.png")
    write_picture(folder / "2.png", seed=20)  # changed
    (folder / "3.png").unlink()
    write_picture(folder / "new.png", seed=21)
    (folder / "copy.png").write_bytes((folder / "new.png").read_bytes())
    grown = update_index(folder, model=model)
    assert grown.num_embedded == 2
    assert {file.image_path for file in grown.files} == {
        "0.png", "2.png", "renamed.png", "new.png", "copy.png", "more/4.png", "more/5.png",
    }  # fmt: skip
    fresh = model.encode(images=[folder / file.image_path for file in grown.files])
    assert np.allclose(grown.embeddings, fresh, atol=1e-6)


def test_the_index_has_clip_retrievals_layout_and_is_of_these_weights(folder, model):
    index = update_index(folder, model=model)
    matrix = np.load(index.place / EMBEDDINGS_FILE)
    assert matrix.shape == (6, 64) and matrix.dtype == np.float32
    names = [json.loads(line)["image_path"] for line in (index.place / METADATA_FILE).read_text().splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(index.place / PARQUET_FILE)["image_path"].to_pylist() == names
    fresh = model.encode(images=[folder / name for name in names])
    assert np.allclose(matrix, fresh, atol=1e-6)
    other = files.small_model(seed=9)
    loaded = clip_train.load(files.write_open_clip_folder(other, folder.parent / "other"), device="cpu")[0]
    assert update_index(folder, model=loaded).num_embedded == 6
    assert len(list((folder / INDEX_FOLDER).iterdir())) == 2


def test_a_damaged_or_half_written_index_is_made_anew(folder, model):
    index = update_index(folder, model=model)
    for name in (EMBEDDINGS_FILE, METADATA_FILE, "index.json"):
        path = index.place / name
        path.write_bytes(path.read_bytes()[:-3] + b"###")
        again = update_index(folder, model=model)
        assert again.num_embedded == 6 and np.array_equal(again.embeddings, index.embeddings)


def test_an_unreadable_picture_is_named_the_others_are_found_and_the_exit_code_is_3(folder, source, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    assert search_command("a cat", folder, model=str(source), html=folder.parent / "page.html") == 3
    output = capsys.readouterr()
    assert "bad.png: unknown format" in output.err
    assert "6 pictures, 6 of them embedded now" in output.out
    page = (folder.parent / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 6 and "http" not in page


def test_a_file_name_that_is_no_utf_8_is_indexed(folder, model):
    pq = pytest.importorskip("pyarrow.parquet")
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "0.png").rename(folder / name)
    index = update_index(folder, model=model)
    assert name in [file.image_path for file in index.files]
    assert "caf\ufffd.png" in pq.read_table(index.place / PARQUET_FILE)["image_path"].to_pylist()
    assert update_index(folder, model=model).num_embedded == 0


def test_what_cannot_be_searched_is_one_line(folder, source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no picture")
    for query, where, words in (
        ("a cat", tmp_path / "empty", "no pictures that can be read"),
        ("a cat", tmp_path / "nowhere", "is no folder"),
        (str(tmp_path / "file"), folder, "unknown format"),
        ("a cat " * 5000, folder, "has 10002 tokens"),
        (str(folder / "0.pgn.png"), folder, "there is no picture"),
    ):
        with pytest.raises(UserError, match=words):
            search_command(query, where, model=str(source))
    with pytest.raises(UserError, match="--top=0"):
        search_command("a cat", folder, model=str(source), top=0)
