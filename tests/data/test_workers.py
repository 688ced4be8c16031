"""Loader processes that die, crash, hang or raise: the batches stay those of a loader that nothing happened to."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import clip_train.data.workers as workers_module
from clip_train.data.config import DataConfig
from clip_train.data.images.transforms import TrainTransform
from clip_train.distributed.world import World
from clip_train.errors import TrainingFailed
from tests.data.made import ByteTokenizer, numbered_shards, stream

COUNTS = [30, 25, 45]
STEPS = 9


class RaisingTokenizer(ByteTokenizer):
    """Raises at one caption, as often as there are lives left in a file."""

    def __init__(self, caption: str, lives: Path) -> None:
        self.caption, self.lives = caption, lives

    def encode_padded(self, text: str):
        if text == self.caption and (left := len(self.lives.read_bytes())):
            self.lives.write_bytes(b"." * (left - 1))
            raise ZeroDivisionError("a bug of ours")
        return super().encode_padded(text)


def _raising_stream(folder: Path, *, lives: int):
    file = folder / "lives"
    file.write_bytes(b"." * lives)
    config = DataConfig(train=str(folder), workers=1, lanes=4, window=6)
    return config.stream(
        config.open_train(world=World()), world=World(), seed=7, global_batch_size=8, image_size=16,
        tokenizer=RaisingTokenizer("n 40", file),
    )  # fmt: skip


def _disturbed(training_stream, disturb, *, at: tuple[int, ...]) -> list:
    batches = []
    others = set(multiprocessing.active_children())
    for step, batch in enumerate(itertools.islice(training_stream.batches(0), STEPS)):
        batches.append(batch)
        if step in at:
            disturb([p.pid for p in multiprocessing.active_children() if p not in others])
    training_stream.close()
    return batches


def _assert_equal(batches, expected) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return numbered_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def expected(shards):
    return list(itertools.islice(stream(shards, World()).batches(0), STEPS))


def test_a_killed_worker_is_replaced_and_no_batch_changes(shards, expected, caplog):
    killed = _disturbed(stream(shards, World(), workers=2), lambda pids: os.kill(pids[0], signal.SIGKILL), at=(1, 5))
    _assert_equal(killed, expected)
    told = [record.getMessage() for record in caplog.records if "is replaced" in record.getMessage()]
    # Batches that were ready still come, so that one look may find both of the dead.
    assert told and all("ended with -9" in line for line in told)


@pytest.mark.slow
def test_a_worker_that_raises_once_is_replaced_and_one_that_always_does_ends_the_run(shards, expected):
    training_stream = _raising_stream(shards, lives=1)
    _assert_equal(_disturbed(training_stream, None, at=()), expected)
    training_stream = _raising_stream(shards, lives=100)
    with pytest.raises(TrainingFailed, match=r"(?s)failed 4 times within 1000 steps; .* sample \d+: .*a bug of ours"):
        list(itertools.islice(training_stream.batches(0), 13))
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL])
def test_crashed_workers_are_replaced(shards, expected, number):
    def all_of_them(pids):
        for pid in pids:
            os.kill(pid, number)

    _assert_equal(_disturbed(stream(shards, World(), workers=2), all_of_them, at=(0, 3, 6)), expected)


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_replaced(shards, expected, monkeypatch):
    monkeypatch.setattr(workers_module, "WORKER_TIMEOUT_SECONDS", 15.0)
    stopped = _disturbed(stream(shards, World(), workers=2), lambda pids: os.kill(pids[1], signal.SIGSTOP), at=(2,))
    _assert_equal(stopped, expected)
    assert not multiprocessing.active_children()


class Slow(TrainTransform):
    """Takes seconds for every picture, none of them of the processor."""

    def __call__(self, content, *, uniforms, out):
        time.sleep(3)
        super().__call__(content, uniforms=uniforms, out=out)


@pytest.mark.slow
def test_a_worker_that_is_slow_and_goes_on_is_left_alone(shards, expected, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "WORKER_TIMEOUT_SECONDS", 15.0)  # a batch of 8 takes 24
    monkeypatch.setattr(DataConfig, "transform", lambda self, *, image_size: Slow(image_size=image_size))
    training_stream = stream(shards, World(), workers=1)
    _assert_equal([next(training_stream.batches(0))], expected[:1])
    training_stream.close()
    assert "is replaced" not in caplog.text


@pytest.mark.slow
def test_a_fourth_failure_ends_the_run_in_time(shards):
    training_stream = stream(shards, World(), workers=1)
    with pytest.raises(TrainingFailed, match=r"failed 4 times .* ended with -9"):
        _disturbed(training_stream, lambda pids: os.kill(pids[0], signal.SIGKILL), at=tuple(range(STEPS)))
