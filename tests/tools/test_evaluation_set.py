"""Sets written in clip-benchmark's layout are read back as they were."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clip_train.cli_shards import shards_make
from clip_train.data.shards.layouts import Layout
from clip_train.errors import UserError
from clip_train.evaluation.classify.labelled_images import open_labelled_images
from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
from tests.evaluation.test_sets import picture, png, write_folders


def labelled(root):
    return open_labelled_images(str(root), split="test", classnames="auto", templates="auto")


def make(source, out, **options):
    shards_make(source, out, layout=Layout.eval, **options)


def test_class_folders_become_a_set_of_several_shards(tmp_path, capsys):
    write_folders(tmp_path / "in", ["tabby_cat", "corgi", "a_cup"])
    Image.fromarray(picture(9)).save(tmp_path / "in" / "corgi" / "y.bmp")
    make(tmp_path / "in", tmp_path / "out", shard_size=3)
    assert capsys.readouterr().out == f"4 pictures of 3 classes in {tmp_path}/out/test\n"
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text() == "2\n"
    assert (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text() == "a photo of a {c}.\n"
    before, after = labelled(tmp_path / "in"), labelled(tmp_path / "out")
    assert list(after.classnames) == list(before.classnames) == ["a cup", "corgi", "tabby cat"]
    np.testing.assert_array_equal(after.labels, before.labels)
    assert after.source.read(0) == before.source.read(0)
    # A format that clip-benchmark does not decode: the same pixels as PNG.
    converted = Image.open(io.BytesIO(after.source.read(2)))
    assert converted.format == "PNG" and np.array_equal(np.array(converted), picture(9))
    with pytest.raises(UserError, match="already holds a set"):
        make(tmp_path / "in", tmp_path / "out")


def test_captions_become_a_retrieval_set_with_one_caption_per_line(tmp_path, capsys):
    images = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": f"a\n{i}"}, {"raw": "b"}]} for i in (0, 1)
    ]
    for i in (0, 1):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    make(tmp_path / "dataset.json", tmp_path / "out")
    assert (tmp_path / "out" / "dataset_type.txt").read_text() == "retrieval\n"
    captions = open_captioned_shards(str(tmp_path / "out"))
    assert (list(captions.captions), captions.owner.tolist()) == (["a 0", "b", "a 1", "b"], [0, 0, 1, 1])
    make(tmp_path / "out", tmp_path / "again")
    assert open_captioned_shards(str(tmp_path / "again")).captions == captions.captions
    assert "2 pictures with 4 captions" in capsys.readouterr().out


def test_options_that_would_change_the_set_are_refused(tmp_path):
    write_folders(tmp_path / "in", ["a"])
    for options, name in (({"val": 0.1}, "--val"), ({"resize": 8}, "--resize"), ({"template": "a {}"}, "--template")):
        with pytest.raises(UserError, match=f"{name} means nothing for --layout eval"):
            make(tmp_path / "in", tmp_path / "out", **options)
