"""Captions from text and JSON members, against what the samples were written with."""

import itertools
import json
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from clip_train.data.caption_fields import parse_caption_fields
from clip_train.data.captions import CaptionChooser, all_captions, caption_extensions
from clip_train.data.config import DataConfig
from clip_train.data.images.decode import BadSampleError
from clip_train.data.images.transforms import sample_uniforms
from clip_train.data.index.files import RECORD_WITH_JSON
from clip_train.data.index.walk import index_shards
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.data.made import caption_of, encoded, picture, steps, stream, write_shard


def _choose(members: dict, *, uniform: float = 0.0, **options) -> str:
    config = DataConfig(**options)
    contents = {e: m if isinstance(m, bytes) else json.dumps(m).encode() for e, m in members.items()}
    fields = config.caption_fields()
    chooser = CaptionChooser(fields, template=config.caption_template)
    return chooser([contents[e] for e in caption_extensions(fields)], uniform=uniform)


def _shard(folder, count: int, *, drop=lambda i, extension: False):
    rows = []
    for i in range(count):
        document = {"caption": f"json {i}", "alts": [f"alt {i} {k}" for k in range(3)], "width": 20}
        members = {"png": encoded(picture(i)), "txt": f"txt {i}".encode(), "json": json.dumps(document).encode()}
        rows.append({"__key__": f"{i:03d}", **{e: m for e, m in members.items() if not drop(i, e)}})
    return write_shard(folder / "a.tar", rows)


def _captions(folder, *, slots: int = 24, workers: int = 0, **options) -> dict[int, str]:
    training_stream = stream(folder, World(), workers=workers, **options)
    found = {}
    for batch in itertools.islice(training_stream.batches(0), slots // 8):
        assert batch.valid.all()
        found |= {slot: caption_of(t) for slot, t in zip(batch.slots.tolist(), batch.tokens, strict=True)}
    training_stream.close()
    return found


def test_a_text_member_is_one_caption_however_many_lines_it_has():
    assert _choose({"txt": b"\xef\xbb\xbf first\nsecond \n"}) == "first\nsecond"


def test_a_json_field_may_be_nested_and_a_list_is_drawn_from_evenly():
    document = {"caption": " a cat ", "meta": {"alt": ["one", "two", "three"]}}
    assert _choose({"json": document}, caption="json:caption") == "a cat"
    drawn = [_choose({"json": document}, uniform=u, caption="json:meta.alt") for u in (0.0, 0.33, 0.34, 0.66, 0.67)]
    assert drawn == ["one", "one", "two", "two", "three"]
    largest = 1 - 2.0**-53
    assert _choose({"json": document}, uniform=largest, caption="json:meta.alt") == "three"


def test_nulls_and_blanks_in_a_list_are_no_captions_that_could_be_drawn():
    documents = {"json": {"caption": [None, "one", " \0", "two", ""]}}
    drawn = [_choose(documents, uniform=u, caption="json:caption") for u in (0.0, 0.49, 0.5, 0.99)]
    assert drawn == ["one", "one", "two", "two"]
    fields = parse_caption_fields("json:caption", None)
    assert CaptionChooser(fields).all([json.dumps(documents["json"]).encode()]) == ["one", "two"]


def test_fields_are_drawn_by_weight_and_the_list_within_a_field_evenly():
    members = {"txt": b"txt", "json": {"short": "short", "many": ["m0", "m1"]}}
    options = {"caption": ["txt", "json:short", "json:many"], "caption_weights": [1, 1, 2]}
    drawn = Counter(_choose(members, uniform=(i + 0.5) / 400, **options) for i in range(400))
    assert drawn == {"txt": 100, "short": 100, "m0": 100, "m1": 100}


def test_a_template_surrounds_every_caption_and_leaves_braces_alone():
    assert _choose({"txt": b"{0} {x}"}, caption_template="a photo of {}.") == "a photo of {0} {x}."


def test_unusable_captions_are_refused_each_with_its_reason():
    cases = [
        ("caption_empty", {"txt": b" \0 \n"}, "txt"),
        ("caption_not_utf8", {"txt": b"\xff\xfe"}, "txt"),
        ("caption_too_long", {"txt": b"x" * (1 << 16) + b"y"}, "txt"),
        ("caption_not_json", {"json": b"{"}, "json:caption"),
        ("caption_not_json", {"json": b"[" * 100_000}, "json:caption"),
        ("caption_not_utf8", {"json": b'{"caption": "\xff"}'}, "json:caption"),
        ("caption_too_long", {"json": b" " * (1 << 20) + b"{}"}, "json:caption"),
        ("caption_missing", {"json": {"other": "x"}}, "json:caption"),
        ("caption_missing", {"json": {"caption": None}}, "json:caption"),
        ("caption_missing", {"json": {"caption": []}}, "json:caption"),
        ("caption_missing", {"json": {"caption": [None]}}, "json:caption"),
        ("caption_empty", {"json": {"caption": ["", None]}}, "json:caption"),
        ("caption_missing", {"json": ["x"]}, "json:caption"),
        ("caption_missing", {"json": {"caption": "x"}}, "json:caption.deeper"),
        ("caption_not_text", {"json": {"caption": 3}}, "json:caption"),
        ("caption_not_text", {"json": {"caption": [{"a": "b"}]}}, "json:caption"),
        ("caption_empty", {"json": {"caption": " "}}, "json:caption"),
    ]
    for reason, members, caption in cases:
        with pytest.raises(BadSampleError) as caught:
            _choose(members, caption=caption)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "jpg"}, "data.caption: 'jpg' must be txt or json:FIELD"),
        ({"caption": "json:"}, "'json:' must be"),
        ({"caption": "json:a..b"}, "must be txt or json"),
        ({"caption": []}, "at least one field"),
        ({"caption": ["txt", "txt"]}, "none twice"),
        ({"caption": ["txt", "json:a"], "caption_weights": [1]}, "a positive number for each"),
        ({"caption": ["txt", "json:a"], "caption_weights": [1, 0]}, "a positive number for each"),
        ({"caption_template": "a photo"}, "must hold {} once"),
        ({"caption_template": "{} {}"}, "must hold {} once"),
    ],
)
def test_a_wrong_choice_of_captions_is_refused_when_the_config_is_read(options, message):
    with pytest.raises(UserError) as caught:
        DataConfig(**options)
    assert message in str(caught.value)


def test_shards_of_three_members_train_with_any_of_them_without_conversion(tmp_path):
    _shard(tmp_path, 9)
    text = _captions(tmp_path)
    assert {caption.split()[0] for caption in text.values()} == {"txt"}
    numbers = {slot: caption.split()[1] for slot, caption in text.items()}
    assert _captions(tmp_path, caption="json:caption") == {slot: f"json {n}" for slot, n in numbers.items()}
    # The draw is word 0 of the slot, so the number of workers cannot change it.
    expected = {slot: f"alt {n} {int(sample_uniforms(7, slot)[0] * 3)}" for slot, n in numbers.items()}
    assert _captions(tmp_path, caption="json:alts") == expected
    both = {slot: f"txt {n}" if sample_uniforms(7, slot)[0] < 0.25 else f"json {n}" for slot, n in numbers.items()}
    options = {"caption": ["txt", "json:caption"], "caption_weights": [1, 3]}
    assert _captions(tmp_path, **options) == both == _captions(tmp_path, workers=2, **options)
    assert len({caption.split()[0] for caption in both.values()}) == 2


def test_each_choice_of_members_has_its_own_index_beside_the_others(tmp_path):
    shard = _shard(tmp_path, 6, drop=lambda i, e: (i, e) in {(1, "txt"), (2, "json"), (4, "json")})
    for captions, n in [(("txt",), 5), (("json",), 4), (("txt", "json"), 3)]:
        summary = index_shards([shard], captions=captions)
        assert summary.num_samples == n
    assert {path.name for path in tmp_path.glob("*.idx")} == {"a.idx", "a.json.idx", "a.txt+json.idx"}
    prints = set()
    for caption in ("txt", "json:caption", ["txt", "json:caption"]):
        (source,) = DataConfig(train=str(tmp_path), caption=caption).open_train(world=World())
        prints.add(source.fingerprint)
    assert len(prints) == 3
    with pytest.raises(UserError, match=r"captions=cls must be one of txt, json, txt\+json"):
        index_shards([shard], captions=("cls",))


def test_a_record_of_two_captions_carries_both_with_their_crcs(tmp_path):
    shard = _shard(tmp_path, 1)
    index_shards([shard], captions=("txt", "json"), crc=True)
    data, record = shard.read_bytes(), np.fromfile(tmp_path / "a.txt+json.idx", dtype=RECORD_WITH_JSON)[0]
    for part, begin in (("image", b"\x89PNG"), ("caption", b"txt 0"), ("json", b'{"caption"')):
        content = data[record[f"{part}_block"] * 512 :][: record[f"{part}_length"]]
        assert content.startswith(begin) and zlib.crc32(content) == record[f"{part}_crc32"]


def test_a_sample_without_the_field_is_counted_and_replaced(tmp_path):
    rows = []
    for i in range(60):
        document = {"caption": f"n {i}"} if i != 5 else {}
        rows.append({"__key__": f"{i:03d}", "png": encoded(picture(i)), "json": json.dumps(document).encode()})
    write_shard(tmp_path / "a.tar", rows)
    training_stream = stream(tmp_path, World(), batch=20, caption="json:caption", max_bad_fraction=1, window=60)
    batches = steps(training_stream, World(), tmp_path, batch=20, count=3)
    assert training_stream.counters() == {"caption_missing": 1}
    captions = [caption_of(t) for b in batches for t in b.tokens[b.valid]]
    assert "n 5" not in captions and torch.cat([b.slots for b in batches]).unique().numel() == 60


def test_an_evaluation_sees_every_caption_of_a_sample():
    fields = parse_caption_fields(["txt", "json:alt.text", "json:title"], None)
    content = {"txt": b"a fox\n\n two foxes \n", "json": b'{"alt": {"text": ["red", "fox "]}, "title": "Fox"}'}
    found = [all_captions(content[field.extension], field=field) for field in fields]
    assert found == [["a fox", "two foxes"], ["red", "fox"], ["Fox"]]
    for broken in (
        b'{"alt": {}}',
        b'{"alt": {"text": []}}',
        b'{"alt": {"text": [null]}}',
        b'{"alt": {"text": 3}}',
        b"{",
    ):
        with pytest.raises(BadSampleError):
            all_captions(broken, field=fields[1])
