"""Sets of choices as their authors publish them, and what is wrong with a broken one."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_train.data.images.decode import open_image
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.choose.choices import Kind
from clip_train.evaluation.choose.config import ChooseConfig
from clip_train.evaluation.choose.files import open_choices


def picture(colour=(255, 0, 0), size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(picture())
    return tmp_path


def test_rows_of_our_own_name_each_picture_once(folder):
    path = write_jsonl(
        folder / "items.jsonl",
        {"image": "b.png", "captions": ["x", "y"], "answer": 1, "tags": ["t", "u"]},
        {"image": "a.png", "captions": ["x", "z"], "answer": 0, "tags": "t"},
        {"images": ["b.png"], "captions": ["x", "z", "y"], "answer": [[0, 0], [0, 2]]},
    )
    choices = open_choices(path, images=None)
    assert [choices.source.key(i) for i in range(len(choices.source))] == ["b.png", "a.png"]
    assert [item.pictures for item in choices.items] == [(0,), (1,), (0,)]
    assert [item.tags for item in choices.items] == [("t", "u"), ("t",), ()]
    assert choices.items[2].right == {(0, 0), (0, 2)}
    assert choices.keys == ["items.jsonl:1", "items.jsonl:2", "items.jsonl:3"]


def test_sugarcrepe_is_a_folder_of_files_with_gaps_in_their_numbers(folder):
    (folder / "val2017").mkdir()
    (folder / "val2017" / "000000000001.jpg").write_bytes(picture())
    row = {"filename": "000000000001.jpg", "caption": "a cat", "negative_caption": "a dog"}
    (folder / "add_att.json").write_text(json.dumps({"0": row, "7": row}))
    (folder / "swap_obj.json").write_text(json.dumps({"3": row}))
    choices = open_choices(str(folder), images=None)
    assert [item.tags for item in choices.items] == [("add_att",), ("add_att",), ("swap_obj",)]
    assert {(item.captions, item.right) for item in choices.items} == {(("a cat", "a dog"), frozenset({(0, 0)}))}
    assert len(choices.source) == 1
    assert choices.keys[1] == "add_att.json:7"
    assert [item.tags for item in open_choices(str(folder / "add_att.json"), images=None).items] == [(), ()]


def test_winoground_names_its_pictures_without_extension(folder):
    (folder / "images").mkdir()
    for i in (0, 1):
        (folder / "images" / f"ex_0_img_{i}.png").write_bytes(picture())
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a b", "caption_1": "b a",
           "tag": "Noun", "collapsed_tag": "Object"}  # fmt: skip
    (item,) = open_choices(write_jsonl(folder / "examples.jsonl", row), images=None).items
    assert (item.kind, item.right, item.tags) == (Kind.pairs, {(0, 0), (1, 1)}, ("Object",))


def test_aro_shows_the_box_of_each_item(folder):
    left, right = np.full((8, 8, 3), 10, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    Image.fromarray(np.concatenate([left, right], axis=1)).save(folder / "vg.png")
    base = {"image_path": "vg.png", "bbox_y": 0, "bbox_w": 8, "bbox_h": 8, "true_caption": "a", "false_caption": "b"}
    rows = [{**base, "bbox_x": 8, "relation_name": "on"}, {**base, "bbox_x": 0, "attributes": ["red", "big"]}]
    (folder / "visual_genome_relation.json").write_text(json.dumps(rows))
    choices = open_choices(str(folder), images=None)
    parts = [np.asarray(open_image(choices.source.read(i))) for i in range(2)]
    assert np.array_equal(parts[0], right) and np.array_equal(parts[1], left)
    assert [item.tags for item in choices.items] == [("on",), ("red_big",)]
    assert {item.right for item in choices.items} == {frozenset({(0, 0)})}


def test_countbench_is_asked_with_every_number(folder):
    rows = [
        {"file_name": "a.png", "text": "Ten cats and two dogs", "number": 2},
        {"image": "b.png", "text": "A set of 3 chairs", "number": 3},
    ]
    first, second = open_choices(write_jsonl(folder / "metadata.jsonl", *rows), images=None).items
    assert first.captions[0] == "Ten cats and two dogs"
    assert first.captions[8] == "Ten cats and ten dogs"
    assert second.captions[1] == "A set of three chairs"
    assert (first.right, second.right) == ({(0, 0)}, {(0, 1)})
    assert len(set(second.captions)) == 9


def test_shards_hold_captions_and_answer_beside_each_picture(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key in ("k1", "k2"):
            row = json.dumps({"captions": ["x", "y"], "answer": 1, "tags": key}).encode()
            for name, content in ((f"{key}.png", picture()), (f"{key}.json", row)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    choices = open_choices(str(folder / "{0..0}.tar"), images=None)
    assert [(item.pictures, item.right, item.tags) for item in choices.items] == [
        ((0,), {(0, 1)}, ("k1",)),
        ((1,), {(0, 1)}, ("k2",)),
    ]


GOOD = {"image": "a.png", "captions": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "answer": 2}, "items.jsonl:2: answer=2 does not fit 1 pictures and 2 captions"),
        ({**GOOD, "captions": "x"}, "items.jsonl:2: captions='x' must be a list of texts"),
        ({"image": "a.png", "captions": ["x", "y"]}, "items.jsonl:2: it has no `answer`"),
        ({"picture": "a.png"}, "items.jsonl:2: it has none of the keys"),
        ([1], "items.jsonl:2: it is no JSON object"),
        ({**GOOD, "image": "missing.png"}, "missing.png is not there; images=DIR"),
        ({**GOOD, "image": "../a.png"}, "must lie below"),
        ({"images": ["a.png", "b.png"], "captions": ["x"], "answer": [1]}, "items.jsonl:2 asks for pictures"),
        ({"image": "a.png", "text": "some cats", "number": 3}, "does not hold the number 3"),
        ({"image": "a.png", "text": "one cat", "number": 1}, "number=1 must be an integer from 2 to 10"),
        ({"image_path": "a.png", "true_caption": "x", "false_caption": "y"}, "not four integers"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, row, message):
    path = write_jsonl(folder / "items.jsonl", GOOD, row)
    with pytest.raises(UserError) as refused:
        open_choices(path, images=None)
    assert message in str(refused.value)


def test_a_file_that_is_not_json_is_named(folder):
    (folder / "items.jsonl").write_text('{"image"\n')
    with pytest.raises(UserError, match=r"items\.jsonl:1 is not JSON"):
        open_choices(str(folder / "items.jsonl"), images=None)


def test_what_is_not_there_is_said_before_the_model_is_loaded(folder):
    assert "items.jsonl is not there" in ChooseConfig(path=str(folder / "items.jsonl")).missing()
    assert ChooseConfig(path=str(folder / "nothing-{0..3}.tar")).missing()
    assert ChooseConfig(path=write_jsonl(folder / "items.jsonl", GOOD)).missing() is None


def test_a_picture_that_vanishes_is_named(folder):
    source = open_choices(write_jsonl(folder / "items.jsonl", GOOD), images=None).source
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        source.read(0)


def test_a_shard_without_answers_is_damage(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        member = tarfile.TarInfo("k.png")
        member.size = len(picture())
        tar.addfile(member, io.BytesIO(picture()))
    with pytest.raises(IntegrityError, match=r"has no \.json member"):
        open_choices(str(folder / "0.tar"), images=None)
