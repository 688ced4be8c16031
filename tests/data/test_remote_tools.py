"""The shard tools and evaluation on remote shards, against the same on the disk."""

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from clip_train.config import load
from clip_train.data.index.files import INDEX_NAME
from clip_train.data.remote.cache import ShardCache
from clip_train.data.sequential import ShardImages, evaluation_batches
from clip_train.data.shard_file import find_files
from clip_train.data.shards.check import check_source
from clip_train.data.shards.index import index_source
from clip_train.data.shards.overlap import find_overlap
from clip_train.data.source import open_source
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.result import read_result
from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
from clip_train.storage import remote
from clip_train.tokenizer.bpe import ClipTokenizer
from clip_train.tools.contact_sheet import write_contact_sheet
from clip_train.tools.replay import replay
from clip_train.train import train
from tests.data.made import encoded, numbered_shards, picture
from tests.data.served import Served

COUNTS = [5, 3, 7, 1, 4]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def memory():
    """A folder of shards in fsspec's memory, which can be written."""
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/tools"):
        memory.rm("/tools", recursive=True)


def _put(memory, folder: Path) -> str:
    for path in folder.iterdir():
        memory.pipe_file(f"/tools/{path.name}", path.read_bytes())
    return "memory://tools"


def _cache(tmp_path: Path, max_bytes: int = 10**9) -> ShardCache:
    return ShardCache(folder=tmp_path / "cache", max_bytes=max_bytes)


def _opened(patterns, tmp_path, **options):
    return open_source(patterns, name="train", world=World(), field="x", cache=_cache(tmp_path), **options)


def test_check_finds_over_http_what_it_finds_on_the_disk(tmp_path):
    origin = numbered_shards(tmp_path / "origin", COUNTS, bad={6})
    index_source(str(origin), crc=True)
    changed = (origin / "s-002.tar").read_bytes()
    (origin / "s-002.tar").write_bytes(changed.replace(b"n 9", b"n 8"))
    (origin / "s-003.tar").write_bytes((origin / "s-003.tar").read_bytes()[:700])
    (origin / "s-004_stats.json").write_text('{"successes": 5}')
    expected = check_source(str(origin), tokenizer=ClipTokenizer(), batch_size=8)
    with Served(origin) as server:
        pattern = f"{server.url}/s-{{000..004}}.tar"
        found = check_source(pattern, tokenizer=ClipTokenizer(), batch_size=8, cache_dir=tmp_path / "cache")
        moved = [
            defect._replace(shard=defect.shard.replace(server.url, str(origin)),
                            detail=defect.detail.replace(server.url, str(origin)))
            for defect in found.defects
        ]  # fmt: skip
    assert {d.reason for d in expected.defects} == {
        "wrong_checksum", "stale_index", "damaged_shard", "wrong_count", "unknown_format",
    }  # fmt: skip
    assert [d[:4] for d in moved] == [d[:4] for d in expected.defects]
    assert found.numbers == expected.numbers
    assert [text.replace(server.url, str(origin)) for text in found.warnings] == expected.warnings
    assert not any(str(tmp_path) in d.detail for d in found.defects)


def test_index_stores_records_and_listing_beside_the_shards_and_training_uses_them(tmp_path, memory):
    origin = numbered_shards(tmp_path / "origin", COUNTS)
    url = _put(memory, origin)
    local = index_source(str(origin), crc=True, conditions=["key!=0002"])
    for pattern in (f"{url}/s-00{{0..1}}.tar", f"{url}/s-00{{2..4}}.tar"):
        index_source(pattern, crc=True, conditions=["key!=0002"], cache_dir=tmp_path / "cache")
    assert memory.cat_file(f"/tools/{INDEX_NAME}") == (origin / INDEX_NAME).read_bytes()
    for path in origin.glob("*.idx"):
        assert memory.cat_file(f"/tools/{path.name}") == path.read_bytes()
    assert not [name for name in memory.ls("/tools", detail=False) if name.endswith(".part")]
    source = _opened(url, tmp_path)
    assert source.num_samples == local.num_samples == 16
    assert source.fingerprint == _opened(str(origin), tmp_path).fingerprint
    memory.pipe_file("/tools/s-001_stats.json", b'{"successes": 4}')
    with pytest.raises(IntegrityError, match=r"^memory:///tools/s-001\.tar holds 3 pictures, but s-001_stats\.json"):
        index_source(url, cache_dir=tmp_path / "cache")


def test_where_nothing_can_be_written_the_index_is_kept_elsewhere(tmp_path):
    origin = numbered_shards(tmp_path / "origin", COUNTS)
    with Served(origin) as server:
        pattern = f"{server.url}/s-{{000..004}}.tar"
        with pytest.raises(UserError, match=r"http://.* cannot be written: keep the index elsewhere with --index-dir"):
            index_source(pattern, cache_dir=tmp_path / "cache")
        options = {"cache_dir": tmp_path / "cache", "index_dir": tmp_path / "index", "conditions": ["key!=0000"]}
        assert index_source(pattern, **options).num_samples == 15
        server.requests.clear()
        source = _opened(pattern, tmp_path, index_dir=tmp_path / "index")
        assert source.counts == [n - 1 for n in COUNTS] and not server.requests
        assert not list((tmp_path / "index").rglob("*.tar"))
        report = check_source(
            pattern, tokenizer=ClipTokenizer(), batch_size=8, cache_dir=tmp_path / "cache", index_dir=tmp_path / "index"
        )  # fmt: skip
        assert (report.numbers["left_out_by_filter"], report.defects) == (5, [])
        assert _opened(pattern, tmp_path).counts == COUNTS


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluation_sees_the_pictures_and_captions_of_remote_shards_in_a_cache_of_one_shard(tmp_path, workers):
    origin = numbered_shards(tmp_path / "origin", COUNTS)
    with Served(origin) as server:
        largest = max(path.stat().st_size for path in origin.glob("*.tar"))
        cache = _cache(tmp_path, max_bytes=largest + 100)
        there = open_captioned_shards(f"{server.url}/s-{{000..004}}.tar", cache=cache)
        here = open_captioned_shards(str(origin))
        assert there.captions == here.captions
        batches = [
            list(evaluation_batches(images.source, world=World(), image_size=16, batch_size=6, workers=workers))
            for images in (there, here)
        ]
        assert all(np.array_equal(a, b) for pair in zip(*batches, strict=True) for a, b in zip(*pair, strict=True))
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes
        assert [there.source.key(i) for i in range(20)] == [here.source.key(i) for i in range(20)]
    with pytest.raises(UserError, match=r"shards=http.*: shards must be local files here"):
        open_captioned_shards("http://127.0.0.1/a.tar")


def test_a_shard_that_changed_its_size_is_fetched_again(tmp_path):
    origin = numbered_shards(tmp_path / "origin", [3])
    with Served(origin) as server:
        for counts in ([3], [6]):
            numbered_shards(origin, counts)
            files = find_files(f"{server.url}/s-000.tar", field="x", cache=_cache(tmp_path))
            assert len(ShardImages(files)) == counts[0]
        assert server.requests["/s-000.tar"] == 2


def test_overlap_and_show_read_remote_shards(tmp_path):
    origin = numbered_shards(tmp_path / "origin", COUNTS)
    (tmp_path / "set").mkdir()
    for n in (7, 100):
        (tmp_path / "set" / f"{n}.png").write_bytes(encoded(picture(n)))
    with Served(origin) as server:
        pattern = f"{server.url}/s-{{000..004}}.tar"
        (overlap,) = find_overlap(pattern, [tmp_path / "set"], cache_dir=tmp_path / "cache")
        assert {overlap.keys[i]: (m.key, m.exact) for i, m in overlap.matches.items()} == {
            "7.png": ("s-001.tar/0002", True)
        }
        page = write_contact_sheet(
            pattern, tmp_path / "sheet.html", number=20, cache_dir=tmp_path / "cache"
        ).read_text()
    assert all(f"n {n}<" in page or f"n {n}\n" in page for n in range(20))


@pytest.mark.slow
def test_a_run_on_remote_shards_is_validated_on_remote_shards_and_replayed(tmp_path):
    origin = numbered_shards(tmp_path / "origin", [30, 20])
    results = {}
    with Served(origin) as server:
        for name, root in (("disk", str(origin)), ("http", server.url)):
            arguments = [
                f"data.train={root}/s-000.tar", f"data.val={root}/s-001.tar", f"run_dir={tmp_path / name}",
                "model=tiny", "data.workers=1", "device=cpu", "precision=fp32", "steps=4", "global_batch_size=12",
                "optim.warmup=0", f"data.cache.dir={tmp_path / 'cache'}", "evaluation=[val]",
                "evaluation.val.workers=1",
            ]  # fmt: skip
            train(load("train", arguments))
            (file,) = (tmp_path / name / "evaluation").glob("step-*/val.json")
            results[name] = read_result(file)["metrics"]
        assert replay(tmp_path / "http", step=3) == replay(tmp_path / "disk", step=3)
    assert results["http"] == results["disk"]


def test_a_message_never_names_a_place_in_the_cache(tmp_path):
    origin = numbered_shards(tmp_path / "origin", [3])
    (origin / "s-000.tar").write_bytes((origin / "s-000.tar").read_bytes()[:700])
    with Served(origin) as server:
        files = find_files(f"{server.url}/s-000.tar", field="x", cache=_cache(tmp_path))
        with pytest.raises(IntegrityError, match=rf"^{server.url}/s-000\.tar at byte 512: the file is cut off"):
            ShardImages(files)
        moved = replace(files[0], folder=tmp_path / "mirror")
    assert moved.named(f"{tmp_path}/mirror/s-000_stats.json is") == f"{server.url}/s-000_stats.json is"
