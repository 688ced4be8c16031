"""A locked image tower whose features are computed once: the same training, and no picture decoded again."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_train.config import load
from clip_train.data.bad import LEDGER_FOLDER
from clip_train.data.features import FeatureTable, SampleTable
from clip_train.data.images.transforms import TrainTransform
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.data.source import open_source
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.locked_tower import BATCH_SIZE
from clip_train.train import train
from tests.test_train import losses, start

SIZE, NUM = 64, 60
WORDS = ["red", "blue", "green", "cup", "fox", "boat"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of the model's own size: cropped to the whole, they are the same in training and evaluation."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardSetWriter(folder, samples_per_shard=25) as writer:
        for i in range(NUM):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "PNG")
            image = buffer.getvalue() if i != 7 else buffer.getvalue()[:200]
            writer.write(f"{i:04d}", {"png": image, "txt": " ".join(rng.choice(WORDS, 3))})
    return folder


def overrides(shards, run_dir, *more):
    return [
        f"data.train={shards}", f"run_dir={run_dir}", "model=tiny", "data.workers=0", "device=cpu", "precision=fp32",
        "steps=15", "global_batch_size=12", "optim.warmup=5", "optim.lr=1e-3", "logging.every=1", "checkpoint.every=5",
        "data.crop_scale=[1,1]", "data.max_bad_fraction=1", "model.vision.unlocked_blocks=0", *more,
    ]  # fmt: skip


CACHED = "model.vision.cache_features=true"


def test_the_losses_are_those_of_computing_every_picture_again(shards, tmp_path, monkeypatch):
    train(load("train", overrides(shards, tmp_path / "plain")))
    decoded = []
    decode = TrainTransform.__call__
    monkeypatch.setattr(TrainTransform, "__call__", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    train(load("train", overrides(shards, tmp_path / "cached", CACHED)))
    assert decoded == []
    plain, cached = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert plain.keys() == cached.keys() == set(range(1, 16))
    assert max(abs(plain[s] - cached[s]) for s in plain) < 2e-6
    ledgers = [(tmp_path / name / LEDGER_FOLDER / "rank-000.jsonl").read_text() for name in ("plain", "cached")]
    assert ledgers[0] == ledgers[1] != ""


def test_an_interrupted_table_goes_on_and_another_tower_starts_over(shards, tmp_path):
    sources = [open_source(str(shards), name="train", world=World(), field="data.train")]
    table = FeatureTable(tmp_path / "features", sources=sources, width=3)
    table.begin({"weights": "a"})
    assert table.missing().tolist() == list(range(NUM))
    numbers = np.array([0, 1, 59])
    table.write(numbers, np.eye(3, dtype=np.float32), valid=np.array([True, False, True]))

    again = FeatureTable(tmp_path / "features", sources=sources, width=3)
    again.begin({"weights": "a"})
    assert again.missing().tolist() == list(range(2, 59))
    assert again.read(0, 0, 0).tolist() == [1, 0, 0]
    assert again.read(0, 0, 1) is None
    assert again.read(0, 2, 9).tolist() == [0, 0, 1]

    other = FeatureTable(tmp_path / "features", sources=sources, width=3)
    other.begin({"weights": "b"})
    assert len(other.missing()) == NUM


def test_numbers_and_places_of_samples_are_each_others_inverse(shards):
    source = open_source(str(shards), name="train", world=World(), field="data.train")
    table = SampleTable([source, source])
    places = [(s, shard, i) for s in range(2) for shard, n in enumerate(source.counts) for i in range(n)]
    assert [table.place(number) for number in range(len(table))] == places
    assert [table.number(*place) for place in places] == list(range(len(table)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_share_the_work(shards, tmp_path, strategy):
    train(load("train", overrides(shards, tmp_path / "one", CACHED)))
    two = start(overrides(shards, tmp_path / "two", CACHED, f"distributed={strategy}"), processes=2)
    _, said = two.communicate(timeout=300)
    assert two.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert max(abs(one[s] - two[s]) for s in one) < 1e-5
    features = [np.fromfile(tmp_path / name / "features" / "features.f32", np.float32) for name in ("one", "two")]
    assert NUM < BATCH_SIZE and np.abs(features[0] - features[1]).max() < 1e-6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.vision.unlocked_blocks=1"], "needs a locked tower"),
        (["data.reader=streaming", "data.num_samples=60"], "needs data.reader=indexed"),
        (["data.flip=true"], "data.flip=True has no effect"),
    ],
)
def test_what_cannot_work_is_refused(shards, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        load("train", overrides(shards, tmp_path, CACHED, *more))
