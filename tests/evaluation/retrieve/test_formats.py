"""Every file that lists images with captions."""

import json

import numpy as np
import pytest

from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.retrieve.annotations import open_annotations
from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.evaluation.retrieve.evaluator import score
from clip_train.evaluation.retrieve.ranking import Ranks
from tests.evaluation.test_sets import png, write_shard

CAPTIONS = {"a.jpg": ["a cup", "an old cup, chipped", "a cup"], "b.jpg": ["a boat"]}


def opened(path, *, split="test", images=None):
    found = open_annotations(str(path), images=images, split=split)
    assert all(found.source.read(i) for i in range(len(found.source)))
    captions = {found.source.key(i): [] for i in range(len(found.source))}
    for caption, i in zip(found.captions, found.owner.tolist(), strict=True):
        captions[found.source.key(i)].append(caption)
    return captions


@pytest.fixture
def pictures(tmp_path):
    for i, name in enumerate(CAPTIONS):
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


def test_coco_captions_keep_a_caption_that_is_there_twice(pictures):
    images = [{"id": 7 + i, "file_name": name} for i, name in enumerate(CAPTIONS)]
    notes = [{"image_id": 7 + i, "caption": c} for i, own in enumerate(CAPTIONS.values()) for c in own]
    (pictures / "captions_val.json").write_text(json.dumps({"images": images, "annotations": notes[::-1]}))
    assert opened(pictures / "captions_val.json") == {name: own[::-1] for name, own in CAPTIONS.items()}


def test_karpathys_splits_give_one_split_and_its_folders(pictures):
    (pictures / "val2014").mkdir()
    (pictures / "val2014" / "a.jpg").write_bytes(png(0))
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "a cup"}, {"raw": "cups"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "a boat"}]},
    ]
    path = pictures / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert opened(path) == {"val2014/a.jpg": ["a cup", "cups"]}
    assert opened(path, split="train") == {"b.jpg": ["a boat"]}
    with pytest.raises(UserError, match="has no pictures of split=val, only of test, train"):
        opened(path, split="val")


def test_rows_of_one_picture_belong_together(pictures):
    rows = [f'{name},"{caption}"\n' for name, own in CAPTIONS.items() for caption in own]
    (pictures / "set.csv").write_text("path,caption\n" + "".join([rows[0], rows[3], *rows[1:3]]))
    assert opened(pictures / "set.csv") == CAPTIONS


def test_lines_of_picture_and_caption_keep_commas_and_quotation_marks(pictures):
    (pictures / "flickr.txt").write_text('image,caption\na.jpg,"Cup", he said, once\na.jpg,a cup .\nb.jpg,a boat\n')
    assert opened(pictures / "flickr.txt") == {"a.jpg": ['"Cup", he said, once', "a cup ."], "b.jpg": ["a boat"]}


def test_clip_benchmarks_retrieval_layout_is_read_in_order_of_its_shards(tmp_path):
    for i in range(11):
        write_shard(tmp_path / "test" / f"{i}.tar", [("s", {"png": png(i), "txt": f"one {i}\ntwo {i}".encode()})])
    (tmp_path / "test" / "nshards.txt").write_text("11\n")
    with pytest.raises(UserError, match=r"holds classes, not captions: evaluate it with evaluation=\[classify\]"):
        open_captioned_shards(str(tmp_path))
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert RetrieveConfig(shards=str(tmp_path)).missing() is None
    images = open_captioned_shards(str(tmp_path))
    assert list(images.captions) == [f"{word} {i}" for i in range(11) for word in ("one", "two")]


def test_wrong_files_are_refused_by_name(pictures):
    (pictures / "x.json").write_text('{"images": [{"file": "a.jpg"}]}')
    with pytest.raises(UserError, match=r"x\.json is neither COCO captions .* nor Karpathy's splits"):
        opened(pictures / "x.json")
    (pictures / "x.txt").write_text("image,caption\nno picture here\n")
    with pytest.raises(UserError, match=r"x\.txt, line 2 is not `picture\.jpg,caption`: 'no picture here'"):
        opened(pictures / "x.txt")
    (pictures / "x.csv").write_text("path,caption\na.jpg,\n")
    with pytest.raises(IntegrityError, match=r"a\.jpg has no caption"):
        opened(pictures / "x.csv")
    (pictures / "x.csv").write_text("image,caption\na.jpg,x\n,y\n")
    with pytest.raises(UserError, match=r"row 2 of x\.csv needs the path of a picture"):
        opened(pictures / "x.csv")
    for fields in ({}, {"shards": "x", "annotations": "y"}):
        with pytest.raises(UserError, match=r"annotations=\w+: give one of them"):
            RetrieveConfig(**fields)


def test_mean_rank_and_rsum_follow_from_the_ranks():
    owner = np.repeat(np.arange(10), 1)
    image = Ranks(2 * np.arange(1, 11), np.zeros(10, dtype=bool), np.ones(10, dtype=np.int64))
    text = Ranks(2 * np.ones(10, dtype=np.int64), np.zeros(10, dtype=bool), np.ones(10, dtype=np.int64))
    details = score(image, text, owner=owner, recall_k=[1, 5, 10]).details
    assert (details["image_retrieval_mean_rank"], details["image_retrieval_median_rank"]) == (5.5, 5.5)
    assert details["text_retrieval_mean_rank"] == 1.0
    assert details["rsum"] == pytest.approx(100 * (0.1 + 0.5 + 1 + 3))
    assert score(image, text, owner=owner, recall_k=[1, 5]).details["rsum"] is None
