"""Catalogue of bad input, items 56 to 67: machine, launcher and libraries."""

import importlib.metadata
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_train.checkpoint.lock import RunLock
from clip_train.step import TrainStep
from tests.catalogue import commands
from tests.data.made import numbered_shards

catalogue = pytest.mark.catalogue
pytestmark = pytest.mark.slow


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_variables(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@catalogue(56)
def test_a_port_in_use_is_named_with_the_way_out(monkeypatch, train):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rank_variables(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        train().refused(2, f"MASTER_PORT={port} is in use", "--standalone")


@catalogue(57)
def test_a_device_that_is_not_there_is_refused_and_auto_says_what_it_took(monkeypatch, train):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train("device=cuda").refused(2, "device=cuda", "no CUDA device", "device=auto")


@catalogue(57)
def test_auto_says_which_device_it_took(monkeypatch, train):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train("device=auto").worked("on 1 x cpu")


@catalogue(58)
@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": 0}, ["WORLD_SIZE", "missing", "torchrun"]),
        ({"RANK": "x", "WORLD_SIZE": 2, "LOCAL_RANK": 0}, ["RANK", "integers", "'x'"]),
        ({"RANK": 5, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, ["RANK=5", "WORLD_SIZE=2"]),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, ["MASTER_ADDR", "missing"]),
    ],
)
def test_missing_or_inconsistent_rank_variables_are_named(monkeypatch, train, variables, parts):
    rank_variables(monkeypatch, **variables)
    train().refused(2, *parts)


@catalogue(58)
def test_a_rank_that_was_not_started_is_named_within_the_timeout(monkeypatch, train, free_port):
    rank_variables(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port)
    started = time.monotonic()
    train("distributed.timeout_seconds=2").refused(2, "rank 1")
    assert time.monotonic() - started < 60


@catalogue(59)
def test_a_run_directory_that_cannot_be_written_is_refused_at_the_start(train, tmp_path):
    (tmp_path / "file").write_text("")
    train(f"run_dir={tmp_path}/file/run").refused(2, f"{tmp_path}/file")
    train("run_dir=/proc/run").refused(2, "/proc/run")


@catalogue(59)
def test_a_full_disk_is_told_with_path_and_bytes_and_what_was_saved_stays(monkeypatch, train, tmp_path):
    train("steps=2", "optim.schedule=constant").worked()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    done = train("steps=8", "optim.schedule=constant", "checkpoint.every=1")
    done.refused(2, tmp_path / "run", "No space left", "1.0 MiB free")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]


@catalogue(60)
def test_too_little_shared_memory_is_refused_before_the_first_batch(monkeypatch, train):
    statvfs = os.statvfs

    def small(path):
        room = statvfs(path)
        if str(path) != "/dev/shm":
            return room
        return os.statvfs_result([room.f_bsize, 4096, *room[2:4], 2**26 // 4096, *room[5:]])

    monkeypatch.setattr(os, "statvfs", small)
    large = ("model.vision.image_size=512", "global_batch_size=60", "data.workers=1")
    train(*large).refused(2, "/dev/shm has 64 MiB left", "need 180", "--shm-size=0.5g", "data.workers=0")
    train("data.workers=1").worked()


@catalogue(61)
def test_256_descriptors_are_enough_for_any_number_of_shards_and_sources(tmp_path):
    folders = [numbered_shards(tmp_path / f"source{i}", [2] * 90) for i in range(3)]
    mixture = "{" + ", ".join(f"{folder.name}: {{shards: {folder}}}" for folder in folders) + "}"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 200, before[1]))
    try:
        done = commands.train(mixture, tmp_path / "run", "steps=45")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    done.worked("pairs from 540")


@catalogue(62)
@pytest.mark.parametrize("key", ["", "0" * 40])
def test_wandb_without_key_or_network_is_a_warning(monkeypatch, train, tmp_path, key):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    train("logging.wandb=online").worked("wandb is switched off for this run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("train/loss") > 0


@catalogue(63)
def test_a_clock_that_jumps_back_changes_nothing(monkeypatch, train):
    hours = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    train("logging.every=1", "max_hours=10").worked("step 4/4")


@catalogue(64)
def test_a_run_needs_no_locale_home_or_terminal(shards, tmp_path):
    folder = tmp_path / "größe"
    shutil.copytree(shards / "train", folder)
    done = subprocess.run(
        [sys.executable, "-m", "clip_train", "train", f"data.train={folder}", f"run_dir={tmp_path}/läufe",
         "model=tiny", "data.workers=1", "device=cpu", "precision=fp32", "steps=2", "global_batch_size=12",
         "optim.warmup=1"],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    said = done.stderr.decode(errors="replace")
    assert (done.returncode, "Traceback" in said) == (0, False), said
    assert (tmp_path / "läufe" / "metrics.jsonl").exists()


@catalogue(65)
def test_a_hang_up_saves_and_asks_to_be_started_again(monkeypatch, train, tmp_path):
    step = TrainStep.__call__

    def hang_up(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        return step(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "__call__", hang_up)
    done = train("checkpoint.every=1000")
    assert (done.code, "Traceback" in done.err) == (85, False), done.err
    assert "saved at step 1" in done.err
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


@catalogue(66)
def test_a_second_run_in_a_directory_learns_who_is_there(train, tmp_path):
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    try:
        train().refused(2, tmp_path / "run", f"in use by process {os.getpid()} on {socket.gethostname()}")
    finally:
        lock.release()


@catalogue(67)
@pytest.mark.parametrize(("name", "found"), [("torch", "2.4.1"), ("pillow", "9.0.0"), ("hydra-core", "1.3.2")])
def test_an_old_library_is_named_with_the_version_that_is_needed(monkeypatch, train, name, found):
    version = importlib.metadata.version
    needed = next(line for line in importlib.metadata.requires("clip-train") if line.startswith(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda one: found if one == name else version(one))
    floor = needed.partition(">=")[2].partition(",")[0]
    train().refused(2, f"{name} {found}, needed", f">={floor}")
