"""Remote shards against the same shards on the disk: over HTTP that fails, over S3, and over fsspec's memory."""

import gc
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_train.data import reader
from clip_train.data.config import DataConfig
from clip_train.data.index.files import INDEX_NAME
from clip_train.data.order import SlotOrder, SourceOrder
from clip_train.data.reader import ShardReader
from clip_train.data.remote import cache
from clip_train.data.remote.cache import CacheFull, RemoteShard, ShardCache
from clip_train.data.remote.config import CacheConfig
from clip_train.data.remote.schedule import Rows, Schedule
from clip_train.data.scenes.write import write_scenes
from clip_train.data.shards.index import index_source
from clip_train.data.source import find_shards, open_source
from clip_train.data.workers import start_worker_server
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.metrics.sinks import read_metrics
from clip_train.storage import remote
from clip_train.storage.remote import size_of
from tests.data.made import ByteTokenizer, numbered_shards, stream, write_shard
from tests.data.served import Served
from tests.gloo import run_on_ranks

COUNTS = [5, 3, 7, 1, 4]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(reader, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def served(tmp_path):
    numbered_shards(tmp_path / "origin", COUNTS)
    with Served(tmp_path / "origin") as server:
        yield server


def cached(tmp_path: Path, **options):
    return {"cache": CacheConfig(dir=str(tmp_path / "cache"), **options)}


def opened(tmp_path: Path, url: str, *, max_bytes: int = 10**9, counts_from_stats: bool = False):
    cache = ShardCache(folder=tmp_path / "cache", max_bytes=max_bytes)
    return open_source(
        url, name="train", world=World(), field="data.train", cache=cache, counts_from_stats=counts_from_stats
    )


def numbers(source) -> list[int]:
    """The captions' numbers of every sample, in shard order."""
    shards = ShardReader(source)
    places = [(shard, index) for shard, n in enumerate(source.counts) for index in range(n)]
    found = [int(shards.read(*place)[1][0].decode().split()[1]) for place in places]
    shards.close()
    return found


def batches_of(training_stream, consumed: int, count: int) -> list:
    batches = list(itertools.islice(training_stream.batches(consumed), count))
    training_stream.close()
    return batches


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def test_braces_folders_and_globs_name_remote_shards_in_order_of_their_names(served):
    expected = [f"{served.url}/s-{i:03d}.tar" for i in range(5)]
    patterns = [f"{served.url}/s-{{004..000}}.tar", served.url + "/", f"{served.url}/s-*.tar"]
    for pattern in [*patterns, patterns[0].replace("http:", "HTTP:")]:
        assert find_shards(pattern, field="data.train") == expected
    with pytest.raises(UserError, match=r"data\.train=gopher://x/a\.tar: gopher:// is not one of"):
        find_shards("gopher://x/a.tar", field="data.train")
    with pytest.raises(UserError, match="streaming"):
        find_shards("pipe:cat a.tar", field="data.train")


def test_an_index_beside_the_shards_is_used_and_nothing_else_is_fetched_before_it_is_read(served, tmp_path):
    index_source(str(tmp_path / "origin"), crc=True)
    local = open_source(str(tmp_path / "origin"), name="train", world=World(), field="data.train")
    source = opened(tmp_path, f"{served.url}/s-{{000..004}}.tar")
    assert source.counts == COUNTS and source.fingerprint == local.fingerprint
    assert set(served.requests) == {f"/{INDEX_NAME}"}
    assert numbers(source) == list(range(20))
    assert served.requests["/s-000.idx"] == served.requests["/s-000.tar"] == 1


def test_without_an_index_every_shard_is_counted_once_and_the_counts_are_kept(served, tmp_path):
    pattern = f"{served.url}/s-{{000..004}}.tar"
    first = opened(tmp_path, pattern)
    assert first.counts == COUNTS and all(len(s.sha256) == 64 for s in first.shards)
    shutil.rmtree(tmp_path / "cache" / "locks")
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    served.requests.clear()
    again = opened(tmp_path, pattern)
    assert again == first and not any(path.endswith(".tar") for path in served.requests)
    assert numbers(again) == list(range(20))


def test_img2datasets_counts_are_believed_only_when_asked_and_checked_on_opening(served, tmp_path):
    pattern = f"{served.url}/s-{{000..004}}.tar"
    for i, count in enumerate(COUNTS):
        stats = tmp_path / "origin" / f"s-{i:03d}_stats.json"
        stats.write_text(json.dumps({"count": 9, "successes": count + (i == 2)}))
    source = opened(tmp_path, pattern, counts_from_stats=True)
    assert source.counts == [5, 3, 8, 1, 4] and not list((tmp_path / "cache").glob("*.tar"))
    assert ShardReader(source).read(1, 2)[1] == [b"n 7"]
    with pytest.raises(IntegrityError, match=r"s-002\.tar holds 7 pairs .*, not 8 as counted; data\.cache\.counts"):
        ShardReader(source).read(2, 0)
    assert opened(tmp_path, pattern).counts == COUNTS


@pytest.mark.parametrize("fault", ["drop", "short", "slow", 500, 503, 429])
def test_a_fault_of_the_transport_is_repaired_by_another_attempt(served, tmp_path, fault):
    source = opened(tmp_path, f"{served.url}/s-{{000..004}}.tar")
    shutil.rmtree(tmp_path / "cache")
    served.requests.clear()
    served.faults["/s-001.tar"] = [fault, fault]
    assert numbers(source) == list(range(20))
    assert served.requests["/s-001.tar"] == (1 if fault == "slow" else 3)
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize(("fault", "message"), [("drop", r"at byte \d+: "), (502, "at byte 0: .*502")])
def test_a_shard_that_never_arrives_stops_the_run_with_its_name_and_byte(served, tmp_path, fault, message):
    source = opened(tmp_path, f"{served.url}/s-{{000..004}}.tar")
    shutil.rmtree(tmp_path / "cache")
    served.faults["/s-001.tar"] = [fault] * 6
    with pytest.raises(IntegrityError, match=rf"/s-001\.tar {message}.*\(6 attempts\)"):
        ShardReader(source).read(1, 0)
    assert ShardReader(source).read(1, 0)[1] == [b"n 5"]  # the seventh


def test_absent_and_forbidden_shards_are_mistakes_of_the_user_and_are_not_tried_again(served, tmp_path):
    with pytest.raises(UserError, match=r"/t-000\.tar: not found"):
        opened(tmp_path, f"{served.url}/t-000.tar")
    assert served.requests["/t-000.tar"] <= 1
    served.faults["/s-000.tar"] = [403, 403]
    with pytest.raises(UserError, match=r"/s-000\.tar: forbidden"):
        opened(tmp_path, f"{served.url}/s-000.tar")


def test_a_size_that_cannot_be_asked_for_is_asked_again_and_never_called_not_found(served, tmp_path):
    url = f"{served.url}/s-000.tar"
    served.heads["/s-000.tar"] = [500, 503, 429]
    served.faults["/s-000.tar"] = [500, 503, 429]
    assert size_of(url) == (tmp_path / "origin" / "s-000.tar").stat().st_size
    served.heads["/s-000.tar"], served.faults["/s-000.tar"] = [500] * 6, [500] * 6
    with pytest.raises(IntegrityError, match=r"s-000\.tar at byte 0: ClientResponseError: 500.*\(6 attempts\)"):
        size_of(url)
    served.heads["/s-000.tar"], served.faults["/s-000.tar"] = [403], [403]
    with pytest.raises(UserError, match=r"s-000\.tar: forbidden"):
        size_of(url)
    with pytest.raises(IntegrityError, match=r"ClientConnectorError.*\(6 attempts\)"):
        size_of("http://127.0.0.1:1/s-000.tar")
    with pytest.raises(UserError, match="put the password into"):
        opened(tmp_path, url.replace("127", "me:secret@127"))


def test_signed_shards_meet_their_statistics(served, tmp_path):
    (tmp_path / "origin" / "s-000_stats.json").write_text('{"successes": 5}')
    signed = f"{served.url}/s-000.tar?sig=a%2Fb"
    assert index_source(signed, index_dir=tmp_path / "index", cache_dir=tmp_path / "cache").num_samples == 5
    assert opened(tmp_path, signed, counts_from_stats=True).counts == [5]
    (tmp_path / "origin" / "s-000_stats.json").write_text('{"successes": 6}')
    with pytest.raises(IntegrityError, match=r"s-000_stats\.json counts 6"):
        index_source(signed, index_dir=tmp_path / "other", cache_dir=tmp_path / "cache")


def test_a_shard_that_changed_after_it_was_counted_is_an_integrity_error(served, tmp_path):
    source = opened(tmp_path, f"{served.url}/s-{{000..004}}.tar")
    shutil.rmtree(tmp_path / "cache")
    path = tmp_path / "origin" / "s-000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"/s-000\.tar: its \d+ bytes do not match their sha256"):
        ShardReader(source).read(0, 0)
    path.write_bytes(content + bytes(1024))
    with pytest.raises(IntegrityError, match=r"/s-000\.tar at byte \d+: \d+ bytes arrived, not \d+"):
        ShardReader(source).read(0, 0)


def test_a_damaged_remote_shard_is_named_by_its_url_and_not_kept(served, tmp_path):
    path = tmp_path / "origin" / "s-003.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(IntegrityError, match=rf"^{served.url}/s-003\.tar at byte \d+: "):
        opened(tmp_path, f"{served.url}/s-003.tar")
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_the_cache_keeps_its_bound_and_evicts_what_no_plan_names_first(tmp_path):
    numbered_shards(tmp_path / "origin", [4] * 5)
    with Served(tmp_path / "origin") as server:
        source = opened(tmp_path, f"{server.url}/s-{{000..004}}.tar")
        shutil.rmtree(tmp_path / "cache")
        _check_evictions(source, tmp_path / "cache")


def _check_evictions(source, folder: Path) -> None:
    shards = source.shards
    assert len({shard.room for shard in shards}) == 1
    cache = ShardCache(folder=folder, max_bytes=3 * shards[0].room)

    def here() -> set[int]:
        assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= cache.max_bytes
        return {i for i, shard in enumerate(shards) if shard.path.exists()}

    with cache.hold(shards[0]), cache.hold(shards[1]), cache.hold(shards[2]):
        assert here() == {0, 1, 2}
    plan = cache.plan()
    plan.publish({shards[0].url: 0, shards[1].url: 50})
    with cache.hold(shards[3]):
        assert here() == {0, 1, 3}  # 2 was in no plan
    with cache.hold(shards[2], distance=20):
        assert here() == {0, 1, 2}
    with cache.hold(shards[4], distance=20):
        assert here() == {0, 1, 4}
    plan.publish({shard.url: i for i, shard in enumerate(shards)})
    with cache.hold(shards[2], distance=2):
        assert here() == {0, 1, 2}  # 4 is needed last
    with pytest.raises(CacheFull), cache.hold(shards[3], distance=3, wait=False):
        pass
    with cache.hold(shards[0]), cache.hold(shards[1]), cache.hold(shards[3]):
        assert here() == {0, 1, 3}  # whoever reads now comes first
    plan.close()
    with pytest.raises(UserError, match=r"data\.cache\.max_bytes=100 must hold a shard"):
        ShardReader(open_with_bound(source, 100)).read(4, 0)


def open_with_bound(source, max_bytes: int):
    assert source.cache is not None
    for path in source.cache.folder.glob("*.tar"):
        path.unlink()
    return replace(source, cache=ShardCache(folder=source.cache.folder, max_bytes=max_bytes))


def test_reading_everything_again_and_again_holds_the_bound_also_for_files_that_are_open(tmp_path):
    numbered_shards(tmp_path / "origin", [4] * 5)
    with Served(tmp_path / "origin") as server:
        source = opened(tmp_path, f"{server.url}/s-{{000..004}}.tar")
        shards = ShardReader(open_with_bound(source, 2 * source.shards[0].room))
        for shard in [0, 1, 2, 3, 4] * 3:
            shards.read(shard, 0)
            targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]  # noqa: PTH115
            evicted = [target for target in targets if "(deleted)" in target and str(tmp_path) in target]
            assert len(evicted) <= 2  # a tar and its records, until the next shard is opened
        shards.close()


def _hold_all(folder: str, max_bytes: int, shards: list[RemoteShard], gate) -> None:
    cache = ShardCache(folder=Path(folder), max_bytes=max_bytes)
    gate.wait(30)
    for shard in shards:
        with cache.hold(shard):
            assert hashlib.file_digest(shard.path.open("rb"), "sha256").hexdigest() == shard.sha256


@pytest.mark.slow
def test_a_disk_without_room_for_a_shard_is_said_and_not_waited_for(served, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_FREE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"cache has room for 0 bytes, and http://\S+/s-000\.tar takes 20,480"):
        opened(tmp_path, f"{served.url}/s-000.tar")


def test_several_processes_download_a_shard_once(served, tmp_path):
    source = opened(tmp_path, f"{served.url}/s-{{000..004}}.tar")
    shutil.rmtree(tmp_path / "cache")
    served.requests.clear()
    for i in range(5):
        served.faults[f"/s-{i:03d}.tar"] = ["slow"]
    start_worker_server()
    context = ForkServerContext()
    gate = context.Barrier(3)
    workers = [
        context.Process(target=_hold_all, args=(str(tmp_path / "cache"), 10**9, list(source.shards), gate))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {path: n for path, n in served.requests.items() if path.endswith(".tar")} == {
        f"/s-{i:03d}.tar": 1 for i in range(5)
    }


def test_batches_over_http_are_those_of_the_local_shards_also_after_a_resume(served, tmp_path):
    numbered_shards(tmp_path / "local", COUNTS)
    expected = batches_of(stream(tmp_path / "local", World()), 0, 8)
    pattern = f"{served.url}/s-{{000..004}}.tar"
    over_http = stream(pattern, World(), workers=2, **cached(tmp_path))
    local = stream(tmp_path / "local", World())
    states = [json.loads(json.dumps(s.state_dict(8))) for s in (over_http, local)]
    assert [s["segments"][0]["sources"][0].pop("shards") for s in states] == [[pattern], [str(tmp_path / "local")]]
    assert states[0] == states[1]
    assert equal(batches_of(over_http, 0, 8), expected)
    shutil.rmtree(tmp_path / "cache")
    served.faults["/s-003.tar"] = [503, "drop"]
    resumed = stream(pattern, World(), workers=1, **cached(tmp_path))
    assert equal(batches_of(resumed, 24, 3), expected[3:6])  # in the second epoch


def _rank_batches(world, url: str, folder: str) -> list:
    config = DataConfig(train=url, workers=0, lanes=4, window=6, cache=CacheConfig(dir=folder))
    training_stream = config.build_train(
        world=world, seed=7, global_batch_size=8, tokenizer=ByteTokenizer(), image_size=16
    )
    return [[tensor.numpy() for tensor in batch] for batch in batches_of(training_stream, 16, 4)]


def test_two_ranks_over_http_get_the_rows_of_the_local_shards_and_share_the_downloads(served, tmp_path):
    expected = batches_of(stream(tmp_path / "origin", World()), 16, 4)  # this indexes the origin too
    url = f"{served.url}/s-{{000..004}}.tar"
    ranks = run_on_ranks(_rank_batches, url, str(tmp_path / "cache"))
    for step, batch in enumerate(expected):
        joined = [np.concatenate(parts) for parts in zip(*(rank[step] for rank in ranks), strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(joined, (t.numpy() for t in batch), strict=True))
    assert [served.requests[f"/s-{i:03d}.tar"] for i in range(5)] == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_before_a_shard_is_here_its_samples_are_read_by_themselves(tmp_path, both):
    """The shards do not come before the third batch has been read."""
    from clip_train.data.shards.index import index_source

    origin = numbered_shards(tmp_path / "origin", COUNTS, bad={2, 9})
    caption = ["txt", "json:x"] if both else "txt"
    if both:
        for shard in origin.glob("*.tar"):
            _with_json(shard)
    options = {"caption": caption}
    index_source(str(origin), crc=True, captions=("txt", "json") if both else ("txt",))
    expected = batches_of(stream(origin, World(), **options), 0, 12)
    with Served(origin, ranges=True) as server:
        for i in range(5):
            server.faults[f"/s-{i:03d}.tar"] = ["stall"]
        over_http = stream(f"{server.url}/s-{{000..004}}.tar", World(), workers=1, **options, **cached(tmp_path))
        found = []
        for number, batch in enumerate(itertools.islice(over_http.batches(0), 12)):
            found.append([tensor.clone() for tensor in batch])
            if number == 2:
                assert sum(server.pieces.values()) >= 24 and not list((tmp_path / "cache").glob("*.tar"))
                server.go_on.set()
        over_http.close()
        assert [server.requests[f"/s-{i:03d}.tar"] for i in range(5)] == [1] * 5
    assert equal(found, expected)


def _with_json(shard: Path) -> None:
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the collector
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        gc.collect()
    write_shard(shard, [{k: s[k] for k in ("__key__", "png", "txt")} | {"json": b'{"x": "n 0"}'} for s in samples])


def test_a_shard_that_nobody_brings_is_fetched_whole_after_a_while(tmp_path, monkeypatch):
    from clip_train.data.shards.index import index_source

    monkeypatch.setattr(reader, "_MAX_PIECES", 3)
    origin = numbered_shards(tmp_path / "origin", [8])
    index_source(str(origin), crc=True)
    with Served(origin, ranges=True) as server:
        shards = ShardReader(opened(tmp_path, f"{server.url}/s-000.tar"))
        shards.in_pieces = True
        assert [shards.read(0, i)[1] for i in range(8)] == [[b"n %d" % i] for i in range(8)]
        assert (server.pieces["/s-000.tar"], server.requests["/s-000.tar"]) == (3, 1)
        assert remote.has_ranges(f"{server.url}/s-000.tar")
        server.ranges = False
        assert not remote.has_ranges(f"{server.url}/s-000.tar")


@pytest.mark.slow
def test_a_first_batch_of_more_shards_than_the_cache_holds_does_not_wait_for_ever(tmp_path):
    origin = numbered_shards(tmp_path / "origin", [4] * 8)
    expected = batches_of(stream(origin, World(), lanes=1, window=4, batch=24), 0, 4)
    with Served(origin) as server:
        bound = 5 * ((origin / "s-000.tar").stat().st_size + 4 * 32)
        options = {"lanes": 1, "window": 4, "batch": 24, "workers": 2} | cached(tmp_path, max_bytes=bound)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        over_http = stream(f"{server.url}/s-{{000..007}}.tar", World(), **options)
        assert equal(batches_of(over_http, 0, 4), expected)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= bound


@pytest.mark.slow
def test_a_cache_of_some_shards_serves_several_epochs_by_the_plan(tmp_path):
    counts = [40] * 12
    numbered_shards(tmp_path / "origin", counts)
    expected = batches_of(stream(tmp_path / "origin", World(), lanes=2, window=40), 0, 150)
    with Served(tmp_path / "origin") as server:
        size = (tmp_path / "origin" / "s-000.tar").stat().st_size
        bound = 10 * (size + 40 * 32)
        options = {"lanes": 2, "window": 40, "workers": 1} | cached(tmp_path, max_bytes=bound)
        training_stream = stream(f"{server.url}/s-{{000..011}}.tar", World(), **options)
        stop, sizes = threading.Event(), []

        def watch() -> None:
            while not stop.wait(0.02):
                files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
                sizes.append(sum(path.stat().st_size for path in files if path.exists()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert equal(batches_of(training_stream, 0, 150), expected)
        stop.set()
        watcher.join()
        assert max(sizes) <= bound
        # 2.5 epochs of 12 shards, each at most twice an epoch: the end of a lane and the begin of the next share one.
        assert sum(n for path, n in server.requests.items() if path.endswith(".tar")) <= 72


def test_too_small_a_cache_is_refused_with_lanes_and_window_that_fit(tmp_path, capsys):
    numbered_shards(tmp_path / "origin", [4] * 24)
    with Served(tmp_path / "origin") as server:
        size = (tmp_path / "origin" / "s-000.tar").stat().st_size
        pattern = f"{server.url}/s-{{000..023}}.tar"
        with pytest.raises(UserError, match=r"data\.lanes=1 data\.window=\d+ would fit"):
            stream(pattern, World(), lanes=4, window=8, **cached(tmp_path, max_bytes=5 * size))
        stream(pattern, World(), lanes=1, window=4, **cached(tmp_path, max_bytes=5 * size)).close()
    assert "of which this machine keeps about" in capsys.readouterr().err


def test_the_schedule_names_exactly_the_shards_of_the_coming_batches():
    counts = [50] * 30
    order = SlotOrder([SourceOrder(counts, name="train", seed=3, lanes=4, window=60)], seed=3)
    schedule = Schedule(order, rows=Rows(8, 16), global_batch_size=16, consumed=160, gap=240)
    for _ in range(40):
        schedule.look_ahead()
    for consumed in (160, 320, 480):
        schedule.forget(consumed)
        first = {}
        for begin in range(consumed, 160 + 40 * 16, 16):
            rows = order.global_batch(begin, global_batch_size=16)[8:]
            for shard in set(order.locate(rows)[1].tolist()):
                first.setdefault(shard, begin - consumed)
        distances = {shard.shard: d for shard, d in schedule.distances(consumed).items()}
        assert distances.keys() == first.keys()
        assert list(distances.values()) == sorted(distances.values())
        assert all(distances[shard] <= d for shard, d in first.items())


def test_a_failing_disk_is_read_again_and_then_named(tmp_path, monkeypatch):
    numbered_shards(tmp_path, COUNTS)
    source = open_source(str(tmp_path), name="train", world=World(), field="data.train")
    real, failures = os.pread, iter([116, 5])  # a stale handle, then an I/O error

    def failing(*args):
        number = next(failures, None)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, "pread", failing)
    assert ShardReader(source).read(0, 1)[1] == [b"n 1"]
    failures = iter([5] * 100)
    with pytest.raises(IntegrityError, match=r"s-000\.tar, sample 1: .*Input/output error \(6 attempts\)"):
        ShardReader(source).read(0, 1)


@pytest.fixture
def bucket(tmp_path, monkeypatch, caplog):
    """A bucket behind a real S3 server with the shards of `tmp_path/origin`, and what was asked of it."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    caplog.set_level("INFO", logger="werkzeug")
    server = ThreadedMotoServer(port=0, verbose=True)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in numbered_shards(tmp_path / "origin", COUNTS).iterdir():
            client.upload_file(str(path), "data", f"train/{path.name}")
        yield client, lambda: Counter(re.findall(r"GET /data/train/(\S+\.tar) ", caplog.text))
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.slow
def test_shards_on_s3_are_those_on_the_disk(bucket, tmp_path):
    expected = batches_of(stream(tmp_path / "origin", World()), 0, 4)
    for pattern in ("s3://data/train/s-{000..004}.tar", "s3://data/train/*.tar"):
        over_s3 = stream(pattern, World(), **cached(tmp_path))
        assert equal(batches_of(over_s3, 0, 4), expected)
    assert bucket[1]() == {f"s-{i:03d}.tar": 1 for i in range(5)}
    with pytest.raises(UserError, match=r"s3://data/train/t\.tar: not found"):
        opened(tmp_path, "s3://data/train/t.tar")


def _rank_on_s3(world, folder: str) -> list:
    config = DataConfig(train="s3://data/train/*.tar", workers=2, lanes=4, window=6, cache=CacheConfig(dir=folder))
    training_stream = config.build_train(
        world=world, seed=7, global_batch_size=8, tokenizer=ByteTokenizer(), image_size=16
    )
    return [[tensor.numpy().copy() for tensor in batch] for batch in batches_of(training_stream, 0, 6)]


_ON_S3 = """
import pickle, sys
from pathlib import Path
from tests.data.test_remote import _rank_on_s3
from tests.gloo import run_on_ranks
ranks = run_on_ranks(_rank_on_s3, sys.argv[1], world_size=int(sys.argv[2]), workers=True, timeout=300)
Path(sys.argv[3]).write_bytes(pickle.dumps(ranks))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "indexed"), [(1, False), (2, False), (2, True)])
def test_ranks_with_workers_share_one_downloader_of_shards_on_s3(bucket, tmp_path, ranks, indexed):
    expected = batches_of(stream(tmp_path / "origin", World()), 0, 6)
    client, downloads = bucket
    for path in (tmp_path / "origin").iterdir() if indexed else ():
        client.upload_file(str(path), "data", f"train/{path.name}")
    # The server that workers are forked from has the environment of its start, so it must start anew.
    subprocess.run(
        [sys.executable, "-c", _ON_S3, str(tmp_path / "cache"), str(ranks), str(tmp_path / "batches")], check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    found = pickle.loads((tmp_path / "batches").read_bytes())
    for step, batch in enumerate(expected):
        joined = [np.concatenate(parts) for parts in zip(*(rank[step] for rank in found), strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(joined, (t.numpy() for t in batch), strict=True))
    if not indexed:  # with an index, samples are also read by themselves
        assert downloads() == {f"s-{i:03d}.tar": 1 for i in range(5)}


def test_any_other_scheme_of_fsspec_works_alike(tmp_path):
    import fsspec

    numbered_shards(tmp_path / "origin", COUNTS)
    expected = batches_of(stream(tmp_path / "origin", World()), 0, 4)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "origin").glob("*.tar"):
        memory.pipe_file(f"/train/{path.name}", path.read_bytes())
    # This file system lives in one process, so it is read without workers.
    for pattern in ("memory://train/s-{000..004}.tar", "memory://train/"):
        assert equal(batches_of(stream(pattern, World(), **cached(tmp_path)), 0, 4), expected)
    memory.rm("/train", recursive=True)


@pytest.mark.slow
def test_the_command_trains_from_an_http_server_on_two_processes_as_it_does_from_the_disk(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=400, num_val=30, seed=0)
    with Served(tmp_path / "scenes" / "train") as server:
        pattern = f"{server.url}/000000.tar"
        server.faults["/000000.tar"] = ["drop", 503]
        for name, train in {"disk": str(tmp_path / "scenes" / "train"), "http": pattern}.items():
            arguments = [
                f"data.train={train}", f"run_dir={tmp_path / name}", f"data.cache.dir={tmp_path / 'cache'}",
                "model=tiny", "data.workers=1", "device=cpu", "precision=fp32", "steps=12", "global_batch_size=12",
                "optim.warmup=5", "logging.every=1",
            ]  # fmt: skip
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            done = subprocess.run(
                [sys.executable, *launcher, "-m", "clip_train", "train", *arguments], capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        assert "remote shards: " in done.stderr and server.requests["/000000.tar"] == 3
    losses = {
        name: [row["train/loss"] for row in read_metrics(tmp_path / name) if "train/loss" in row]
        for name in ("disk", "http")
    }
    assert losses["http"] == losses["disk"] and len(losses["http"]) == 12
