"""The streaming reader: which shards are seen, what a resume repeats, and how it ends where nothing can be used."""

import itertools
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_train.config import load
from clip_train.config_dir import config_dir
from clip_train.data.config import DataConfig, Reader
from clip_train.data.order import SHARD, key, permutation, source_id
from clip_train.data.source import find_streams
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from tests.data.made import ByteTokenizer, caption_of, encoded, numbered_shards, picture, write_shard
from tests.data.served import Served
from tests.gloo import run_on_ranks

COUNTS = [12, 9, 15, 7, 11, 10]


def streaming(train, world=World(), *, batch: int = 8, seed: int = 7, **options):  # noqa: B008
    config = DataConfig(train=train, reader=Reader.streaming, **({"workers": 0, "num_samples": 64} | options))
    return config.build_train(world=world, seed=seed, global_batch_size=batch, tokenizer=ByteTokenizer(), image_size=16)


def take(stream, count: int, *, consumed: int = 0) -> list:
    batches = list(itertools.islice(stream.batches(consumed), count))
    stream.close()
    return batches


def numbers(batches) -> list[int]:
    return [int(caption_of(tokens).split()[1]) for batch in batches for tokens in batch.tokens]


def shard_of(number: int) -> int:
    return int(np.searchsorted(np.cumsum(COUNTS), number, side="right"))


def test_an_epoch_shows_every_sample_once_and_the_next_begins_behind_it(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    batches = take(streaming(str(tmp_path)), 16)
    assert sorted(numbers(batches[:8])) == sorted(numbers(batches[8:])) == list(range(64))
    assert numbers(batches[:8]) != numbers(batches[8:]) != sorted(numbers(batches[8:]))
    assert [s for batch in batches for s in batch.slots.tolist()] == list(range(128))
    assert all(
        torch.equal(a.images, b.images) for a, b in zip(batches, take(streaming(str(tmp_path)), 16), strict=True)
    )
    assert numbers(take(streaming(str(tmp_path), seed=8), 8)) != numbers(batches[:8])


def test_files_urls_and_commands_give_the_same_samples(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    local = take(streaming(f"{tmp_path}/s-{{000..005}}.tar"), 4)
    piped = take(streaming(f"pipe:cat {tmp_path}/s-{{000..005}}.tar", allow_pipe=True), 4)
    with Served(tmp_path) as server:
        remote = take(streaming(f"{server.url}/s-{{000..005}}.tar"), 4)
    for a, b, c in zip(local, piped, remote, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.images, c.images) and torch.equal(a.tokens, b.tokens)


def test_commands_run_only_where_the_command_line_allows_it(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match=r"runs a command in a shell: say data\.allow_pipe=true"):
        streaming(f"pipe:touch {marker}")
    with pytest.raises(UserError, match=r"data\.reader=streaming reads them"):
        DataConfig(train=f"pipe:touch {marker}", allow_pipe=True).open_train(world=World())
    assert not marker.exists()
    command = "pipe:curl HTTP://Host/{0..1}.tar"
    assert find_streams(command, field="x", allow_pipe=True) == [command.replace("{0..1}", i) for i in "01"]


def test_a_recipe_cannot_allow_commands(tmp_path, monkeypatch):
    shutil.copytree(config_dir(), tmp_path / "configs")
    recipe = "# @package _global_\ndata: {reader: streaming, num_samples: 9, allow_pipe: true}\n"
    (tmp_path / "configs" / "experiment" / "found.yaml").write_text(recipe)
    monkeypatch.setattr("clip_train.config.config_dir", lambda: tmp_path / "configs")
    arguments = ["experiment=found", "steps=5", "optim.warmup=1"]
    with pytest.raises(UserError, match=r"data\.allow_pipe=true counts on the command line only"):
        load("train", arguments)
    assert load("train", [*arguments, "data.allow_pipe=true"]).data.allow_pipe


def test_a_command_that_fails_and_a_stream_that_breaks_off_stop_the_run_with_their_names(tmp_path):
    numbered_shards(tmp_path, [30])
    whole = (tmp_path / "s-000.tar").read_bytes()
    with pytest.raises(IntegrityError, match=r"^pipe:cat \S+s-000\.tar; exit 7: the command ended with 7$"):
        take(streaming(f"pipe:cat {tmp_path}/s-000.tar; exit 7", allow_pipe=True), 9)
    with pytest.raises(IntegrityError, match=r"the command ended with 127$"):
        take(streaming("pipe:2>/dev/null no-such-command", allow_pipe=True), 1)
    (tmp_path / "s-000.tar").write_bytes(whole[:20_000])
    with pytest.raises(IntegrityError, match=r"s-000\.tar cannot be read as a stream of tar members: ReadError"):
        take(streaming(str(tmp_path)), 9)
    (tmp_path / "s-000.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(IntegrityError, match=r"s-000\.tar cannot be read as a stream"):
        take(streaming(str(tmp_path)), 9)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_a_usable_sample_end_the_run_with_what_they_hold(tmp_path, workers):
    for shard in range(2):
        rows = [{"__key__": str(i), "jpg": b"x", "cls": b"1"} for i in range(30)]
        write_shard(tmp_path / f"{shard}.tar", rows)
    stream = streaming(str(tmp_path), workers=workers)
    with pytest.raises(
        IntegrityError, match=r"has a sample with a picture .* and txt: \d+ samples had \.cls and \.jpg"
    ):
        take(stream, 1)
    stream.close()
    for shard in range(2):
        rows = [{"__key__": str(i), "jpg": b"no picture", "txt": b"a"} for i in range(70)]
        write_shard(tmp_path / f"{shard}.tar", rows)
    with pytest.raises(IntegrityError, match=r"100 samples in a row cannot be used.*0/\d+: unknown_format|100 samples"):
        take(streaming(str(tmp_path)), 1)


def test_a_bad_sample_is_counted_and_the_next_one_takes_its_row(tmp_path):
    numbered_shards(tmp_path, COUNTS, bad={3, 20})
    stream = streaming(str(tmp_path), num_samples=62, batch=31)
    batches, reports = [], []
    for batch in itertools.islice(stream.batches(0), 2):
        batches.append(batch)
        reports.append(stream.take_report())
    stream.close()
    assert sorted(numbers(batches)) == sorted(set(range(64)) - {3, 20})
    assert all(batch.valid.all() for batch in batches)
    bad = [sample for report in reports for sample in report.bad]
    assert sorted((Path(sample.shard).name, sample.index, sample.reason) for sample in bad) == [
        ("s-000.tar", 3, "unknown_format"),
        ("s-001.tar", 8, "unknown_format"),
    ]


def test_a_resume_begins_with_the_first_shard_that_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.data.streaming.pipeline.SHUFFLE_BUFFER", 4)
    numbered_shards(tmp_path, COUNTS)
    for epoch, steps in ((0, 5), (1, 12)):
        stream = streaming(str(tmp_path))
        seen = []
        for batch in itertools.islice(stream.batches(0), steps):
            seen += numbers([batch])
        state = stream.state_dict(8 * steps)
        stream.close()
        order = permutation(6, key(7, SHARD, source_id("train"), epoch)).tolist()
        times = Counter(seen)
        whole = [s for s in order if all(times[n] > epoch for n in range(64) if shard_of(n) == s)]
        finished = list(itertools.takewhile(lambda s: s in whole, order))  # noqa: B023
        assert (state["epoch"], state["floor"]) == (epoch, len(finished)) and finished
        for workers in (0, 1):
            resumed = streaming(str(tmp_path), workers=workers)
            resumed.load_state_dict(state)
            rest = numbers(take(resumed, 8, consumed=8 * steps))
            expected = {n for n in range(64) if shard_of(n) not in finished}
            assert set(rest[: len(expected)]) == expected
    with pytest.raises(IntegrityError, match="seed=7, this run 8"):
        streaming(str(tmp_path), seed=8).load_state_dict(state)


def test_a_batch_that_was_fetched_but_not_trained_on_does_not_move_the_place(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    stream = streaming(str(tmp_path))
    for _ in itertools.islice(stream.batches(0), 16):
        pass
    assert stream.state_dict(64)["epoch"] == 0 and stream.state_dict(128)["epoch"] >= 1


def _rank(world, folder: str) -> tuple[list[int], dict]:
    stream = streaming(folder, world)
    batches = take(stream, 6)
    return numbers(batches), stream.state_dict(48)


def test_two_ranks_share_the_shards_and_agree_on_the_place(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    (first, state), (second, other) = run_on_ranks(_rank, str(tmp_path))
    assert state == other
    order = permutation(6, key(7, SHARD, source_id("train"), 0)).tolist()
    for rank, seen in enumerate((first, second)):
        assert {shard_of(n) for n in seen} <= set(order[rank::2])
        assert len(set(seen)) == len(seen) == 24


def test_too_few_shards_and_missing_or_needless_counts_are_refused(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    with pytest.raises(UserError, match=r"6 shards for 2 ranks with data\.workers=4"):
        streaming(str(tmp_path), World(size=2), workers=4)
    with pytest.raises(UserError, match=r"needs data\.num_samples"):
        DataConfig(train=str(tmp_path), reader=Reader.streaming)
    with pytest.raises(UserError, match=r"data\.num_samples=9 is for data\.reader=streaming"):
        DataConfig(train=str(tmp_path), num_samples=9)
    with pytest.raises(UserError, match="reads one source"):
        DataConfig(train={"a": {"shards": "x"}}, reader=Reader.streaming, num_samples=9)


def test_compressed_tars_are_read_too(tmp_path):
    numbered_shards(tmp_path, [10])
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as packed, tarfile.open(tmp_path / "s-000.tar") as plain:
        for member in plain:
            packed.addfile(member, plain.extractfile(member))
    assert sorted(numbers(take(streaming(f"{tmp_path}/z.tar.gz", num_samples=10, batch=10), 1))) == list(range(10))


def test_pictures_are_those_of_the_shard(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "x", "png": encoded(picture(5, size=(16, 16))), "txt": b"n 5"}])
    (batch,) = take(streaming(str(tmp_path), num_samples=1, batch=1, crop_scale=[1.0, 1.0]), 1)
    assert np.array_equal(batch.images[0].numpy(), np.asarray(picture(5, size=(16, 16))))
