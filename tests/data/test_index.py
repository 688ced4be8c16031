"""Indexing and reading shards, against webdataset reading the same files."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
import webdataset

from clip_train.data.files import one_writer
from clip_train.data.index.files import RECORD, load_index
from clip_train.data.index.jobs import run_jobs
from clip_train.data.index.walk import IndexOptions, index_shard, index_shards, publish_index
from clip_train.data.reader import ShardReader
from clip_train.data.shards.index import index_source
from clip_train.data.source import expand_shards, open_source
from clip_train.distributed.stop import STOP_SIGNALS
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, Stopped, UserError
from tests.data.made import encoded, numbered_shards, picture, write_shard
from tests.gloo import run_on_ranks


def _open(pattern, name="train"):
    return open_source(str(pattern), name=name, world=World(), field="data.train")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_every_sample_equals_what_webdataset_reads(tmp_path):
    numbered_shards(tmp_path, [3, 1, 4])
    source = _open(tmp_path)
    reader = ShardReader(source, max_open=1)
    for shard, entry in enumerate(source.shards):
        samples = list(webdataset.WebDataset(str(entry.path), shardshuffle=False))
        assert entry.n == len(samples)
        for index, sample in enumerate(samples):
            assert reader.read(shard, index) == (sample["png"], [sample["txt"]])
            assert reader.key(shard, index) == f"{entry.path.name}/{sample['__key__']}.png"
    reader.close()


def test_records_are_32_little_endian_bytes_and_carry_crcs_on_request(tmp_path):
    import zlib

    content = encoded(picture(1))
    path = write_shard(tmp_path / "a.tar", [{"__key__": "x", "png": content, "txt": b"hello"}])
    index_source(str(tmp_path), crc=True)
    record = np.fromfile(tmp_path / "a.idx", dtype=RECORD)[0]
    assert (tmp_path / "a.idx").stat().st_size == RECORD.itemsize == 32
    data = path.read_bytes()
    assert data[record["image_block"] * 512 :][: record["image_length"]] == content
    assert data[record["caption_block"] * 512 :][: record["caption_length"]] == b"hello"
    assert (record["image_crc32"], record["caption_crc32"]) == (zlib.crc32(content), zlib.crc32(b"hello"))
    document = json.loads((tmp_path / "index.json").read_text())
    assert (document["N"], document["shards"][0]["n"], document["shards"][0]["bytes"]) == (1, 1, len(data))


def test_incomplete_samples_are_counted_and_get_no_place(tmp_path):
    good = {"png": encoded(picture(0)), "txt": b"a"}
    write_shard(
        tmp_path / "a.tar", [{"__key__": "0", **good}, {"__key__": "1", "png": b"x"}, {"__key__": "2", "txt": b"b"}]
    )
    summary = index_source(str(tmp_path))
    assert summary.num_samples == 1
    assert summary.skipped == {"png": 1, "txt": 1}


def test_shards_without_any_pair_are_an_error_that_shows_what_they_hold(tmp_path):
    for name, hint in (("", "$"), ("IMG.", "; a key ends at the first dot of the name")):
        samples = [{"__key__": str(i), f"{name}jpg": b"x", f"{name}cls": b"1"} for i in range(3)]
        write_shard(tmp_path / "a.tar", samples)
        with pytest.raises(IntegrityError, match=rf"3 of {name}cls\+{name}jpg{hint}".lower()):
            index_source(str(tmp_path))


def test_indexing_in_several_processes_gives_the_same_files(tmp_path):
    numbered_shards(tmp_path, [2, 3])
    shards = expand_shards(str(tmp_path))
    index_shards(shards, jobs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    index_shards(shards, jobs=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ctrl_c_waits_for_the_processes_of_a_job_and_never_reaches_them():
    here = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    there = list(run_jobs(partial(signal.pthread_sigmask, signal.SIG_BLOCK), [[], []], jobs=2))
    assert [blocked >= STOP_SIGNALS for blocked in there] == [True, True]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == here


def test_a_job_that_is_given_up_does_not_wait_for_what_is_under_way():
    results = run_jobs(time.sleep, [0, 600, 600], jobs=2)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_the_processes_of_a_job_end_with_a_parent_that_is_killed():
    code = (
        "import time; from clip_train.data.index.jobs import run_jobs\n"
        "for _ in run_jobs(time.sleep, [0, 0, 600, 600], jobs=2): print('up', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.kill()
        process.communicate(timeout=60)  # until the last process has closed its standard output


def test_a_pass_that_is_asked_to_leave_leaves_after_a_shard_and_nothing_behind(tmp_path):
    numbered_shards(tmp_path, [2, 3, 4])
    before = sorted(tmp_path.iterdir())
    seen = iter([None, Stopped("enough")])

    def leave_if_asked():
        if error := next(seen):
            raise error

    with pytest.raises(Stopped):
        index_shards(expand_shards(str(tmp_path)), jobs=1, leave_if_asked=leave_if_asked)
    assert sorted(tmp_path.iterdir()) == before and next(seen, None) is None


def test_the_fingerprint_follows_content_and_not_the_place(tmp_path):
    for folder in ("a", "b"):
        numbered_shards(tmp_path / folder, [2, 3])
    numbered_shards(tmp_path / "c", [2, 4])
    os.utime(tmp_path / "b" / "s-000.tar", (1, 1))
    prints = [_open(tmp_path / folder).fingerprint for folder in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_source_may_take_some_shards_of_a_folder(tmp_path):
    numbered_shards(tmp_path, [2, 3, 4])
    assert _open(tmp_path / "s-{000..001}.tar").counts == [2, 3]
    assert _open(tmp_path / "s-002.tar").counts == [4]
    assert _open(tmp_path).counts == [2, 3, 4]


def test_a_shard_that_changed_after_indexing_is_refused_with_both_sizes(tmp_path):
    numbered_shards(tmp_path, [2])
    source = _open(tmp_path)
    path = tmp_path / "s-000.tar"
    old = path.stat().st_size
    write_shard(path, [{"__key__": str(i), "png": encoded(picture(i)), "txt": b"x"} for i in range(20)])
    new = path.stat().st_size
    with pytest.raises(IntegrityError, match=rf"size {old} -> {new}"):
        _open(tmp_path)
    with pytest.raises(IntegrityError, match=rf"size {old} -> {new}"):
        ShardReader(source).read(0, 0)


def test_damaged_content_damaged_records_and_vanished_shards_are_integrity_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.data.reader.FIRST_WAIT_SECONDS", 0.001)
    numbered_shards(tmp_path, [2])
    index_source(str(tmp_path), crc=True)
    source, tar = _open(tmp_path), tmp_path / "s-000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"s-000\.tar at byte 512: .*crc32"):
        ShardReader(source).read(0, 0)
    idx = tmp_path / "s-000.idx"
    records = bytearray(idx.read_bytes())
    records[0] ^= 1
    idx.write_bytes(records)
    with pytest.raises(IntegrityError, match=r"s-000\.idx does not match"):
        ShardReader(source).read(0, 0)
    tar.unlink()
    with pytest.raises(IntegrityError, match="No such file"):
        ShardReader(source).read(0, 0)


def test_an_index_of_another_version_is_refused(tmp_path):
    numbered_shards(tmp_path, [2])
    index_source(str(tmp_path))
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(IntegrityError, match="version 9"):
        load_index(expand_shards(str(tmp_path)))


def test_missing_shards_are_named_and_the_first_five_only(tmp_path):
    numbered_shards(tmp_path, [1, 1])
    with pytest.raises(UserError, match=r"data\.train=.*s-002\.tar.*s-006\.tar, and 3 more"):
        expand_shards(str(tmp_path / "s-{000..009}.tar"), field="data.train")
    with pytest.raises(UserError, match=r"nothing-\*\.tar"):
        expand_shards(str(tmp_path / "nothing-*.tar"))


@pytest.mark.parametrize("pattern", ["s-{000..", "a**b.tar", "a\0b.tar", "x" * 5000, ""])
def test_what_is_no_pattern_is_refused_as_one(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(numbered_shards(tmp_path, [1]))
    with pytest.raises(UserError, match=r"data\.train="):
        expand_shards(pattern, field="data.train")


def test_two_runs_may_index_the_same_shards_at_once(tmp_path):
    (shard,) = expand_shards(str(numbered_shards(tmp_path, [3])))
    options = [IndexOptions(), IndexOptions()]
    indexed = [index_shard(shard, options=attempt) for attempt in options]
    for entry, attempt in zip(indexed, options, strict=True):
        publish_index([entry], options=attempt)
    assert load_index([shard]) == ([indexed[0].entry], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "s-000.idx", "s-000.tar"]


def test_the_records_and_the_listing_of_an_index_are_always_of_one_pass(tmp_path):
    (first,) = index_shards([write_shard(tmp_path / "a.tar", [_sample("0"), _sample("1")])]).shards
    options = IndexOptions(rule=_OnlyTheFirst())
    second = index_shard(first.path, options=options)
    publishing = threading.Thread(target=publish_index, args=([second],), kwargs={"options": options})
    with one_writer(tmp_path):  # as another pass that has written its records, and not yet its listing
        publishing.start()
        publishing.join(0.2)
        assert first.idx_path.stat().st_size == 2 * RECORD.itemsize
    publishing.join()
    entries, _ = load_index([first.path])
    assert (entries[0].n, first.idx_path.stat().st_size) == (1, RECORD.itemsize)


class _OnlyTheFirst:
    def __call__(self, shard, pairs):
        return [None, *["later"] * (len(pairs) - 1)]


def _sample(key: str) -> dict:
    return {"__key__": key, "png": encoded(picture(int(key))), "txt": b"x"}


def test_an_index_that_cannot_be_written_is_a_user_error(tmp_path):
    numbered_shards(tmp_path / "in", [3])
    (tmp_path / "in" / "s-000.idx").mkdir()
    with pytest.raises(UserError, match=r"s-000\.idx cannot be written"):
        index_source(str(tmp_path / "in"))
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        index_source(str(tmp_path / "in"), index_dir=tmp_path / "in" / "s-000.tar")


def test_patterns_may_be_folders_globs_braces_lists_and_odd_names(tmp_path, monkeypatch):
    folder = numbered_shards(tmp_path / "with space # ? ü", [1, 1])
    (folder / "s-000.tar").rename(folder / "z.tar")
    monkeypatch.setenv("HOME", str(folder))
    names = ["s-001.tar", "z.tar"]
    patterns = [
        str(folder),
        str(folder / "*.tar"),
        [str(folder / "z.tar"), str(folder / "s-001.tar")],
        "~/{z,s-001}.tar",
    ]
    for pattern in [*patterns, f"{folder}/z.tar::{folder}/s-001.tar"]:
        assert [path.name for path in expand_shards(pattern)] == names


def test_a_shard_listed_twice_is_used_once(tmp_path, caplog):
    numbered_shards(tmp_path, [1, 1])
    assert len(expand_shards([str(tmp_path), str(tmp_path / "s-000.tar")])) == 2
    assert "listed twice" in caplog.text


def test_shards_are_numbered_by_the_bytes_of_their_names(tmp_path):
    for name in ("b/1.tar", "a/2.tar", "Z/3.tar", "é/4.tar", "\udce9/5.tar"):  # the last is Latin-1
        write_shard(tmp_path / name, [{"__key__": "0", "png": b"x", "txt": b"y"}])
    found = expand_shards(str(tmp_path / "*" / "*.tar"))
    assert [p.parent.name for p in found] == ["Z", "a", "b", "é", "\udce9"]
    lines = b"".join(b"%s\t1\t%d\n" % (os.fsencode(p.relative_to(tmp_path)), p.stat().st_size) for p in found)
    assert _open(tmp_path / "*" / "*.tar").fingerprint == sha256(lines).hexdigest()


def _open_on_a_rank(world, folder):
    try:
        return open_source(folder, name="train", world=world, field="data.train").counts
    except IntegrityError as error:
        return str(error)


def test_rank_0_indexes_for_all_ranks_and_all_ranks_raise_its_error(tmp_path):
    numbered_shards(tmp_path / "good", [2, 3])
    assert run_on_ranks(_open_on_a_rank, str(tmp_path / "good")) == [[2, 3], [2, 3]]


@pytest.mark.slow
def test_all_ranks_raise_the_error_that_rank_0_found(tmp_path):
    numbered_shards(tmp_path, [2])
    with (tmp_path / "s-000.tar").open("r+b") as file:
        file.truncate(700)
    first, second = run_on_ranks(_open_on_a_rank, str(tmp_path))
    assert "cut off" in first
    assert first == second


def test_a_list_of_shards_too_long_for_a_path_is_understood(tmp_path):
    numbered_shards(tmp_path, [1])
    with pytest.raises(UserError, match=r"not found: .* and 395 more"):
        expand_shards("::".join(f"{i}.tar" for i in range(400)))
