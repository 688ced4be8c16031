"""Copies of checkpoints elsewhere: on a real S3-compatible server, and through fsspec's memory file system."""

import shutil

import fsspec
import pytest

from clip_train.checkpoint.copies import RemoteCopies
from clip_train.checkpoint.manifest import MANIFEST_NAME
from clip_train.checkpoint.retention import list_checkpoints, step_of
from clip_train.errors import IntegrityError, UserError
from tests.checkpoint.parts import open_fixed, save_steps

URL = "memory://bucket/runs/x"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr("clip_train.storage.remote.FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def elsewhere():
    """The memory file system, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def names_elsewhere(url=URL, run_dir=None):
    return RemoteCopies(url, run_dir=run_dir, say=print).names()


def resumed_value(run_dir, url=URL, lines=None):
    """Resume in a directory and return the step, and the value that was loaded."""
    checkpointer, part = open_fixed(run_dir, remote=url, lines=lines)
    with checkpointer:
        found = checkpointer.resume("auto")
    return (found.step, part.value) if found else None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_copies_follow_what_is_kept_here(tmp_path, elsewhere, asynchronous):
    save_steps(tmp_path, *range(10, 101, 10), remote=URL, every=10, milestone_every=40, asynchronous=asynchronous)
    assert names_elsewhere(run_dir=tmp_path) == [f"step-{step:08d}" for step in (40, 80, 90, 100)]


def test_a_lost_machine_continues_from_the_newest_copy(tmp_path, elsewhere):
    save_steps(tmp_path / "lost", 1, 2, 3, remote=URL)
    lines = []
    assert resumed_value(tmp_path / "new", lines=lines) == (3, 3.0)
    assert any("fetched step-00000003 from memory://bucket/runs/x/checkpoints" in line for line in lines)


def test_a_copy_without_a_manifest_is_not_whole(tmp_path, elsewhere):
    save_steps(tmp_path / "lost", 1, 2, remote=URL)
    elsewhere.rm(f"/bucket/runs/x/checkpoints/step-00000002/{MANIFEST_NAME}")
    assert resumed_value(tmp_path / "new") == (1, 1.0)


def test_a_damaged_copy_is_passed_over_with_its_name(tmp_path, elsewhere):
    save_steps(tmp_path / "lost", 1, 2, remote=URL)
    name = "/bucket/runs/x/checkpoints/step-00000002/model.safetensors"
    content = bytearray(elsewhere.cat(name))
    content[-5] ^= 1
    elsewhere.pipe(name, bytes(content))
    lines = []
    assert resumed_value(tmp_path / "new", lines=lines) == (1, 1.0)
    assert any("skipped" in line and "step-00000002" in line and "model.safetensors" in line for line in lines)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "new")] == [1]


def test_copies_of_which_none_is_intact_are_an_error_and_no_fresh_start(tmp_path, elsewhere):
    save_steps(tmp_path / "lost", 1, remote=URL)
    elsewhere.pipe("/bucket/runs/x/checkpoints/step-00000001/model.safetensors", b"x")
    with pytest.raises(IntegrityError, match="none of 1 copies is intact"):
        resumed_value(tmp_path / "new")


def test_a_step_saved_anew_after_a_rewind_replaces_its_copy(tmp_path, elsewhere):
    checkpointer, part = open_fixed(tmp_path / "run", remote=URL)
    with checkpointer:
        for value in (1.0, 5.0):
            part.fill(value)
            checkpointer.save(step=7, consumed=7, config_yaml="")
    assert resumed_value(tmp_path / "new") == (7, 5.0)


def test_a_place_that_fails_is_told_and_does_not_stop_the_run(tmp_path):
    lines = []
    checkpointer, part = open_fixed(tmp_path, remote="http://127.0.0.1:9/x", lines=lines)
    with checkpointer:
        part.fill(1.0)
        checkpointer.save(step=1, consumed=1, config_yaml="")
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1]
    assert any("are behind, the next save tries again" in line for line in lines)


def test_a_path_is_refused_as_a_place_for_copies(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.remote=/data must be a URL"):
        open_fixed(tmp_path, remote="/data")


@pytest.mark.slow
def test_copies_live_in_a_bucket(tmp_path, monkeypatch):
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        url = "s3://bucket/runs/x"
        save_steps(tmp_path / "lost", 1, 2, 3, remote=url)
        assert names_elsewhere(url, tmp_path) == ["step-00000002", "step-00000003"]
        shutil.rmtree(tmp_path / "lost")
        assert resumed_value(tmp_path / "new", url) == (3, 3.0)
    finally:
        server.stop()
