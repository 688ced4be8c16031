"""Leakage of evaluation pictures: planted copies are found for what they are, and nothing else is."""

import csv
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_train.data.images import perceptual_hash
from clip_train.data.shards import overlap
from clip_train.data.shards.overlap import find_overlap, write_matches
from clip_train.errors import UserError

NUM_TRAINING = 30


def drawing(seed, *, side=96):
    """A smooth random picture, which survives what a picture goes through."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def encoded(picture, kind="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_shard(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, content in contents.items():
            for name, data in ((f"{key}.png", content), (f"{key}.txt", b"a drawing")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    for shard in range(3):
        seeds = range(10 * shard, 10 * shard + 10)
        write_shard(folder / f"{shard}.tar", {f"{seed:04d}": encoded(drawing(seed)) for seed in seeds})
    return folder


PLANTED = {
    "same_file": lambda: encoded(drawing(3)),
    "resized": lambda: encoded(drawing(7).resize((40, 40))),
    "enlarged": lambda: encoded(drawing(8).resize((300, 300), Image.Resampling.BICUBIC)),
    "squashed": lambda: encoded(drawing(11).resize((64, 96))),
    "jpeg": lambda: encoded(drawing(14), "jpeg", quality=40),
    "webp": lambda: encoded(drawing(15), "webp", quality=30),
    "small_jpeg": lambda: encoded(drawing(22).resize((32, 32)), "jpeg", quality=60),
    "brighter": lambda: encoded(drawing(23).point(lambda v: min(255, int(1.1 * v)))),
    "mirrored": lambda: encoded(drawing(29).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "jpeg", quality=70),
}
SOURCE = dict(zip(PLANTED, ["0003", "0007", "0008", "0011", "0014", "0015", "0022", "0023", "0029"], strict=True))


@pytest.fixture(scope="module")
def evaluation_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for name, make in PLANTED.items():
        (folder / f"{name}.png").write_bytes(make())
    for seed in range(100, 140):
        (folder / f"other_{seed}.png").write_bytes(encoded(drawing(seed)))
    return folder


def found_in(result):
    return {result.keys[i].removesuffix(".png"): match for i, match in result.matches.items()}


def test_planted_copies_are_found_and_nothing_else(training, evaluation_set):
    (result,) = find_overlap(str(training), [evaluation_set])
    found = found_in(result)
    assert {name: match.key.partition("/")[2] for name, match in found.items()} == SOURCE
    assert [name for name, match in found.items() if match.exact] == ["same_file"]
    assert [name for name, match in found.items() if match.mirrored] == ["mirrored"]
    assert set(result.counts.values()) == {1} and result.uncompared == 0
    assert "9 of 49 pictures (18.37%)" in result.line() and "1 the same file, 8 alike" in result.line()


def test_pieces_and_shards_of_any_size_find_the_same(training, evaluation_set, monkeypatch):
    (whole,) = find_overlap(str(training), [evaluation_set])
    monkeypatch.setattr(overlap, "_ROWS_PER_PRODUCT", 7)
    monkeypatch.setattr(overlap, "_PICTURES_PER_PRODUCT", 3)
    monkeypatch.setattr(overlap, "_PICTURES_PER_TASK", 5)
    (pieces,) = find_overlap(str(training), [evaluation_set])
    assert pieces == whole


@pytest.mark.slow
def test_two_processes_find_the_same(training, evaluation_set):
    assert find_overlap(str(training), [evaluation_set], jobs=2) == find_overlap(str(training), [evaluation_set])


def test_several_sets_are_told_apart_and_written_as_a_table(training, evaluation_set, tmp_path):
    shards = tmp_path / "wds" / "test"
    write_shard(shards / "0.tar", {"a": encoded(drawing(5)), "b": encoded(drawing(200)), "c": encoded(drawing(5))})
    first, second = find_overlap(str(training), [evaluation_set, tmp_path / "wds"])
    assert len(first.matches) == len(PLANTED)
    assert [second.keys[i] for i in second.matches] == ["0.tar/a", "0.tar/c"]
    write_matches([first, second], tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PLANTED) + 2
    assert rows[-1]["training_picture"] == "0.tar/0005" and rows[-1]["exact"] == "1"


def test_a_picture_that_training_has_twice_is_counted_twice(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", {"a": encoded(drawing(1)), "b": encoded(drawing(1), "jpeg", quality=50)})
    write_shard(tmp_path / "set" / "0.tar", {"x": encoded(drawing(1).resize((48, 48)))})
    (result,) = find_overlap(str(tmp_path / "train"), [tmp_path / "set"])
    assert result.counts == {0: 2}


def test_pictures_of_one_colour_match_by_their_bytes_only(tmp_path):
    blank, other = (Image.new("RGB", (40, side), "white") for side in (40, 50))
    write_shard(tmp_path / "train" / "0.tar", {"a": encoded(blank), "b": encoded(drawing(1))})
    write_shard(tmp_path / "set" / "0.tar", {"x": encoded(blank), "y": encoded(other), "z": b"no picture"})
    (result,) = find_overlap(str(tmp_path / "train"), [tmp_path / "set"])
    assert {i: match.exact for i, match in result.matches.items()} == {0: True}
    assert result.uncompared == 3


def test_the_bits_are_those_of_the_cosine_transform():
    fft = pytest.importorskip("scipy.fft")
    picture = drawing(4)
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3), dtype=float)
    low = fft.dctn(grey, type=2)[:8, :8]
    expected = np.where(low > np.median(low), 1, -1)
    got = perceptual_hash.fingerprint(np.asarray(picture))
    assert (got.bits.reshape(8, 8) == expected).all()


def test_distance_and_likeness_follow_their_definitions():
    rng = np.random.default_rng(0)
    a, b = (rng.choice([-1, 1], (5, 64)).astype(np.int8) for _ in range(2))
    assert perceptual_hash.distances(a, b).tolist() == [[int((x != y).sum()) for y in b] for x in a]
    x, y = (rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    expected = [np.corrcoef(p.ravel(), q.ravel())[0, 1] for p, q in zip(x, y, strict=True)]
    assert perceptual_hash.likeness(x, y) == pytest.approx(expected)


def test_a_set_that_is_not_there_is_refused(training, tmp_path):
    with pytest.raises(UserError, match="is not a folder of pictures"):
        find_overlap(str(training), [tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds neither pictures"):
        find_overlap(str(training), [tmp_path])
    with pytest.raises(UserError, match="--distance=40"):
        find_overlap(str(training), [tmp_path], max_distance=40)
