"""Evaluation reading: every picture once at any number of ranks, in the geometry of the published models."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.data.images.transforms import preprocess_pixels
from clip_train.data.sequential import FolderImages, ShardImages, evaluation_batches
from clip_train.data.source import expand_shards
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from tests.data.made import encoded, picture, write_shard


def _shards(folder, count: int = 7) -> ShardImages:
    rows = [{"__key__": f"{i}", "png": encoded(picture(i)), "cls": b"%d\n" % i} for i in range(count)]
    write_shard(folder / "0.tar", rows[:3])
    write_shard(folder / "1.tar", rows[3:])
    return ShardImages(expand_shards(str(folder)))


def _folder(folder, count: int = 7) -> FolderImages:
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
    (folder / "notes.txt").write_text("not a picture")
    return FolderImages(folder)


@pytest.mark.parametrize("make", [_shards, _folder])
@pytest.mark.parametrize(("size", "batch_size"), [(1, 3), (2, 3), (3, 2), (4, 8), (9, 2)])
def test_every_picture_is_valid_exactly_once_and_all_ranks_take_the_same_steps(tmp_path, make, size, batch_size):
    source = make(tmp_path)
    steps, seen = set(), []
    for rank in range(size):
        world = World(rank=rank, size=size)
        batches = list(evaluation_batches(source, world=world, image_size=16, batch_size=batch_size))
        steps.add(len(batches))
        for images, indices, valid in batches:
            assert images.shape == (batch_size, 16, 16, 3)
            assert torch.equal(valid, indices >= 0) and not images[~valid].any()
            seen += indices[valid].tolist()
            for row, index in zip(images[valid], indices[valid].tolist(), strict=True):
                image = Image.open(io.BytesIO(source.read(index)))
                assert np.array_equal(row.numpy(), preprocess_pixels(image, image_size=16))
    assert len(steps) == 1
    assert seen == list(range(7))


def test_workers_change_nothing(tmp_path):
    source = _shards(tmp_path)
    options = {"world": World(), "image_size": 16, "batch_size": 2}
    alone, helped = (list(evaluation_batches(source, workers=workers, **options)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_keys_and_text_members_belong_to_their_picture(tmp_path):
    source = _shards(tmp_path / "shards")
    assert [source.key(i) for i in (0, 3)] == ["0.tar/0", "1.tar/3"]
    assert [source.text(i, "cls") for i in range(7)] == [str(i) for i in range(7)]
    with pytest.raises(IntegrityError, match=r"1\.tar/4 has no \.txt member, only cls, png"):
        source.text(4, "txt")
    assert _folder(tmp_path / "folder").key(0) == "class0/0.png"


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    _folder(tmp_path)
    (tmp_path / "class1" / "1.png").write_bytes(encoded(picture(1))[:200])
    with pytest.raises(IntegrityError, match=r"class1/1\.png cannot be decoded"):
        list(evaluation_batches(FolderImages(tmp_path), world=World(), image_size=16, batch_size=4))


def test_a_picture_that_resizing_would_blow_up_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (1, 300_000))))
    with pytest.raises(IntegrityError, match=r"a\.png cannot be decoded for evaluation: too_many_pixels"):
        list(evaluation_batches(FolderImages(tmp_path), world=World(), image_size=224, batch_size=1))


def test_nothing_to_evaluate_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        FolderImages(tmp_path)
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "txt": b"x"}])
    with pytest.raises(IntegrityError, match="no pictures"):
        ShardImages(expand_shards(str(tmp_path)))
