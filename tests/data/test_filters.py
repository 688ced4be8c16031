"""Filters at index time: what stays is chosen here by plain Python over the same metadata."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from clip_train.data.bad import BadLedger, BadSample
from clip_train.data.index.files import HAS_CRC, RECORD
from clip_train.data.reader import ShardReader
from clip_train.data.shards.filters import parse_condition
from clip_train.data.shards.index import index_source
from clip_train.data.source import open_source
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from tests.data.made import caption_of, encoded, numbered_shards, picture, stream, write_shard


def _scored_shards(folder: Path, counts: list[int]) -> list[dict]:
    """Shards with a json member like img2dataset's; returns the metadata in order."""
    rows = []
    for shard, count in enumerate(counts):
        samples = []
        for index in range(count):
            number = len(rows)
            size = (20 + 10 * (number % 3), 18)
            row = {
                "key": f"{shard}{index:03d}", "caption": f"n {number}", "similarity": round(0.1 * (number % 7), 1),
                "LANGUAGE": ["en", "de", None][number % 3], "original_width": str(100 * number),
            }  # fmt: skip
            rows.append(row | {"width": size[0]})
            samples.append(
                {
                    "__key__": row["key"],
                    "jpg": encoded(picture(number, size=size), "JPEG"),
                    "txt": row["caption"].encode(),
                    "json": json.dumps(row).encode(),
                }
            )
        write_shard(folder / f"{shard:05d}.tar", samples)
    return rows


def _open(folder: Path, **options):
    return open_source(str(folder), name="train", world=World(), field="data.train", **options)


def _captions(folder: Path) -> list[str]:
    source = _open(folder)
    reader = ShardReader(source)
    return [reader.read(s, i)[1][0].decode() for s, entry in enumerate(source.shards) for i in range(entry.n)]


FILTERS = [
    (["similarity>=0.3"], lambda row: row["similarity"] >= 0.3),
    (["similarity < 0.3", "LANGUAGE=en"], lambda row: row["similarity"] < 0.3 and row["LANGUAGE"] == "en"),
    (["LANGUAGE!=en"], lambda row: row["LANGUAGE"] == "de"),
    (["original_width>900"], lambda row: int(row["original_width"]) > 900),
    (["width>=30"], lambda row: row["width"] >= 30),
    (["key in {ids}"], lambda row: row["key"] in {"0001", "1002"}),
]


@pytest.mark.parametrize(("conditions", "expected"), FILTERS, ids=[" ".join(c) for c, _ in FILTERS])
def test_the_samples_that_meet_all_conditions_stay_in_order(tmp_path, conditions, expected):
    rows = _scored_shards(tmp_path / "in", [9, 12])
    (tmp_path / "ids.txt").write_text("0001\n1002\n")
    whole = _open(tmp_path / "in").fingerprint
    conditions = [condition.format(ids=tmp_path / "ids.txt") for condition in conditions]
    summary = index_source(str(tmp_path / "in"), conditions=conditions)
    assert _captions(tmp_path / "in") == [row["caption"] for row in rows if expected(row)]
    assert summary.num_samples + sum(summary.left_out.values()) == len(rows)
    assert _open(tmp_path / "in").fingerprint != whole
    index_source(str(tmp_path / "in"))
    assert (_open(tmp_path / "in").fingerprint, len(_captions(tmp_path / "in"))) == (whole, len(rows))


def test_truths_and_keys_are_compared_as_what_they_are(tmp_path):
    rows = [("1", True), ("01", False), ("1_0", True)]
    sample = {"png": encoded(picture(0)), "txt": b"x"}
    rows = [{"__key__": key, "json": json.dumps({"nsfw": nsfw}).encode(), **sample} for key, nsfw in rows]
    write_shard(tmp_path / "a.tar", rows)
    expected = {"nsfw!=true": 1, "nsfw=True": 2, "nsfw!=1": 1, "nsfw=0": 1, "key=1": 1, "key!=01": 2}
    for condition, count in expected.items():
        assert index_source(str(tmp_path), conditions=[condition]).num_samples == count, condition


def test_a_shard_without_the_field_is_left_out_and_counted_beside_others(tmp_path):
    _scored_shards(tmp_path, [9])
    numbered_shards(tmp_path, [2])
    summary = index_source(str(tmp_path), conditions=["similarity>=0.3"])
    assert summary.num_samples == 4
    assert summary.left_out["no similarity (in the json members of its shard: none)"] == 2


def test_two_filters_that_keep_as_many_samples_have_different_fingerprints(tmp_path):
    _scored_shards(tmp_path, [8])
    prints = set()
    for condition in ("original_width<400", "original_width>=400"):
        assert index_source(str(tmp_path), conditions=[condition]).num_samples == 4
        prints.add(_open(tmp_path).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("condition", ["similarity>=0.2", "original_width>=900"])  # the second empties a shard
def test_the_training_order_holds_every_survivor_once_an_epoch_and_nothing_else(tmp_path, condition):
    rows = _scored_shards(tmp_path, [9, 3, 12])
    index_source(str(tmp_path), conditions=[condition])
    name, bound = condition.split(">=")
    survivors = sorted(row["caption"] for row in rows if float(row[name]) >= float(bound))
    batches = stream(tmp_path, World(), batch=len(survivors)).batches(0)
    for _ in range(2):
        assert sorted(caption_of(tokens) for tokens in next(batches).tokens) == survivors


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["similarity"], "must be FIELD OPERATOR VALUE"),
        (["similarity>=high"], "'high' is not a number"),
        (["key in nothing.txt"], r"nothing\.txt cannot be read"),
        (
            ["simlarity>0.1"],
            "9 by no simlarity .in the json .*: LANGUAGE, caption, original_width, similarity",
        ),
        (["similarity=>0.1"], "must be FIELD OPERATOR VALUE"),
        (["similarity>9"], "the filter leaves no sample of 9: 9 by not similarity>9"),
    ],
)
def test_a_wrong_filter_is_refused_and_the_index_stays_as_it_was(tmp_path, conditions, message):
    _scored_shards(tmp_path, [9])
    index_source(str(tmp_path), conditions=["similarity>=0.3"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        index_source(str(tmp_path), conditions=conditions)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_conditions_print_as_they_are_written(tmp_path):
    (tmp_path / "ids.txt").write_text("1\n")
    for text in ("similarity>=0.3", f"key in {tmp_path}/ids.txt", "a.b=x y"):
        assert str(parse_condition(text)) == text


def test_shards_filtered_for_one_caption_are_not_indexed_whole_for_another(tmp_path):
    _scored_shards(tmp_path, [9])
    index_source(str(tmp_path), conditions=["similarity>=0.3"])
    with pytest.raises(UserError, match="--captions json and the filter"):
        _open(tmp_path, captions=("json",))
    index_source(str(tmp_path), captions=("json",), conditions=["similarity>=0.3"])
    assert _open(tmp_path, captions=("json",)).num_samples == _open(tmp_path).num_samples


def test_new_shards_in_a_filtered_folder_are_taken_whole_and_said(tmp_path, caplog):
    _scored_shards(tmp_path, [9])
    index_source(str(tmp_path), conditions=["similarity>=0.3"])
    numbered_shards(tmp_path, [2])
    assert _open(tmp_path).counts == [4, 2]
    assert "1 new shards are not filtered" in caplog.text


def _ledger(run: Path, rows: list[tuple[str, str, int, str, str]], *, rank: int = 0) -> Path:
    run.mkdir(exist_ok=True)
    ledger = BadLedger(run, rank=rank)
    ledger.write([BadSample(g, *row, k=1) for g, row in enumerate(rows)], step=1)
    ledger.close()
    with (run / "bad" / f"rank-{rank:03d}.jsonl").open("a") as file:
        file.write('{"step": 2, "g')  # a kill leaves the last line unfinished
    return run / "bad"


def test_quarantine_leaves_out_what_a_run_could_not_use(tmp_path):
    numbered_shards(tmp_path / "in", [4, 5, 3], bad={2, 5, 8})
    source = _open(tmp_path / "in")
    reader = ShardReader(source)
    rows = [
        ("train", source.shards[s].path.name, i, reader.key(s, i), "unknown_format")
        for s, i in [(0, 2), (1, 1), (1, 4)]
    ]
    ledger = _ledger(tmp_path / "run", rows[:2])
    _ledger(tmp_path / "run", rows[2:], rank=1)
    summary = index_source(str(tmp_path / "in"), quarantine=ledger)
    assert summary.left_out == {"quarantined, unknown_format": 3}
    assert _captions(tmp_path / "in") == [f"n {n}" for n in range(12) if n not in {2, 5, 8}]
    batches = stream(tmp_path / "in", World(), batch=9).batches(0)
    assert next(batches).valid.all()


def test_the_ledger_of_a_mixture_needs_the_source_to_be_named(tmp_path):
    numbered_shards(tmp_path / "in", [4])
    rows = [
        ("a", "s-000.tar", 1, "s-000.tar/0001.png", "undecodable"),
        ("b", "s-000.tar", 2, "s-000.tar/0002.png", "x"),
    ]
    ledger = _ledger(tmp_path / "run", rows)
    with pytest.raises(UserError, match="several sources, a, b: pass --source"):
        index_source(str(tmp_path / "in"), quarantine=ledger)
    with pytest.raises(UserError, match="nothing of source 'c'"):
        index_source(str(tmp_path / "in"), quarantine=ledger, source="c")
    index_source(str(tmp_path / "in"), quarantine=ledger, source="b")
    assert _captions(tmp_path / "in") == ["n 0", "n 1", "n 3"]
    with pytest.raises(UserError, match="holds no ledger"):
        index_source(str(tmp_path / "in"), quarantine=tmp_path)


def _records(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype=RECORD)


def test_indexing_again_keeps_the_checksums_of_unchanged_shards(tmp_path):
    numbered_shards(tmp_path, [4, 4])
    index_source(str(tmp_path), crc=True)
    before = _records(tmp_path / "s-001.idx")
    write_shard(tmp_path / "s-000.tar", [{"__key__": "0", "png": encoded(picture(99)), "txt": b"new"}])
    index_source(str(tmp_path))
    assert np.array_equal(_records(tmp_path / "s-001.idx"), before)
    assert not _records(tmp_path / "s-000.idx")["flags"].any()


def test_samples_that_come_back_get_checksums_if_the_others_have_them(tmp_path):
    rows = _scored_shards(tmp_path, [9])
    index_source(str(tmp_path), crc=True, conditions=["similarity>=0.3"])
    index_source(str(tmp_path))
    records = _records(tmp_path / "00000.idx")
    assert (records["flags"] == HAS_CRC).all()
    assert records["caption_crc32"].tolist() == [zlib.crc32(row["caption"].encode()) for row in rows]


def test_a_checksum_is_kept_from_before_the_damage_and_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.data.reader.FIRST_WAIT_SECONDS", 0.001)
    numbered_shards(tmp_path, [2])
    index_source(str(tmp_path), crc=True)
    data = bytearray((tmp_path / "s-000.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "s-000.tar").write_bytes(data)
    index_source(str(tmp_path))
    with pytest.raises(IntegrityError, match="crc32"):
        ShardReader(_open(tmp_path)).read(0, 0)


def test_an_index_elsewhere_serves_folders_that_cannot_be_written(tmp_path):
    for name in ("a", "b"):
        numbered_shards(tmp_path / name, [2, 3])
    before = sorted(tmp_path.glob("[ab]/*"))
    index_source(str(tmp_path / "*" / "*.tar"), index_dir=tmp_path / "index")
    assert sorted(tmp_path.glob("[ab]/*")) == before
    source = _open(tmp_path / "b", index_dir=tmp_path / "index")
    assert source.counts == [2, 3]
    assert ShardReader(source).read(1, 2)[1] == [b"n 4"]
    batch = next(stream(tmp_path / "a", World(), batch=5, index_dir=str(tmp_path / "index")).batches(0))
    assert sorted(caption_of(tokens) for tokens in batch.tokens) == [f"n {n}" for n in range(5)]
    assert sorted(tmp_path.glob("[ab]/*")) == before


def test_a_shard_that_is_cut_off_gives_its_whole_samples_where_that_is_asked_for(tmp_path):
    numbered_shards(tmp_path, [4, 4])
    path = tmp_path / "s-001.tar"
    data = path.read_bytes()
    cut = int(_records_after_index(tmp_path)["caption_block"][2]) * 512  # the third caption's header is left, no more
    path.write_bytes(data[:cut])
    with pytest.raises(IntegrityError, match=r"s-001\.tar at byte \d+: the file is cut off"):
        index_source(str(tmp_path))
    summary = index_source(str(tmp_path), allow_truncated=True)
    assert (summary.num_samples, summary.skipped, len(summary.cuts)) == (6, {"png": 1}, 1)
    assert "used up to the cut" in str(summary)
    assert _captions(tmp_path) == [f"n {n}" for n in range(6)]


def _records_after_index(folder: Path) -> np.ndarray:
    index_source(str(folder))
    return _records(folder / "s-001.idx")


def test_a_count_that_contradicts_img2datasets_statistics_is_an_integrity_error(tmp_path):
    _scored_shards(tmp_path, [9])
    statistics = tmp_path / "00000_stats.json"
    statistics.write_text(json.dumps({"count": 12, "successes": 9, "failed_to_download": 3}))
    index_source(str(tmp_path))
    statistics.write_text(json.dumps({"count": 12, "successes": 10, "failed_to_download": 2}))
    with pytest.raises(IntegrityError, match=r"00000\.tar holds 9 pictures, but 00000_stats\.json counts 10"):
        index_source(str(tmp_path))
