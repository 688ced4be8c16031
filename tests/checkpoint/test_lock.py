"""One writer per run directory."""

import dataclasses
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from clip_train.checkpoint.lock import Owner, RunLock
from clip_train.errors import UserError
from tests.checkpoint.parts import open_fixed, save_steps

fork = multiprocessing.get_context("fork")


def hold(run_dir, ready, leave):
    RunLock(run_dir)
    ready.set()
    leave.wait(30)
    os._exit(0)  # without giving the lock back


def test_a_second_run_in_a_directory_is_refused_and_learns_who_is_there(tmp_path):
    ready, leave = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, ready, leave))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid} on "):
            open_fixed(tmp_path)
    finally:
        leave.set()
        process.join()
    lines = []
    checkpointer, _ = open_fixed(tmp_path, lines=lines)
    checkpointer.close()
    assert len(lines) == 1
    assert f"process {process.pid} on" in lines[0]
    assert "is gone, took over" in lines[0]


def test_a_lock_is_given_back(tmp_path):
    save_steps(tmp_path, 1)
    assert not (tmp_path / "lock").exists()
    save_steps(tmp_path, 2)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links_can_be_locked_too(tmp_path, monkeypatch, number):
    def refuse(*_args, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    lock = RunLock(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        RunLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def write_owner(run_dir: Path, **changes) -> None:
    owner = dataclasses.replace(Owner.this_process(), **changes)
    (run_dir / "lock").write_text(json.dumps(dataclasses.asdict(owner)))


def test_an_owner_on_another_host_is_never_taken_for_dead(tmp_path):
    write_owner(tmp_path, host="elsewhere", boot_id="other", pid=2**22 + 1)
    with pytest.raises(UserError, match=r"in use by process 4194305 on elsewhere.*another run_dir.*delete .*lock if"):
        RunLock(tmp_path)
    with pytest.raises(UserError, match=r"choose another sweep\.dir or stop that process"):
        RunLock(tmp_path, key="sweep.dir")


@pytest.mark.parametrize("changes", [{"boot_id": "before the restart"}, {"started": "1"}, {"pid": 2**22 + 1}])
def test_an_owner_that_is_gone_from_this_host_is_replaced(tmp_path, changes):
    write_owner(tmp_path, **changes)
    lines = []
    lock = RunLock(tmp_path, say=lines.append)
    assert len(lines) == 1
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_slurm_job_replaces_its_former_self_on_another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_owner(tmp_path, host="elsewhere")
    with pytest.raises(UserError):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path, say=lambda line: None).release()


def test_a_lock_that_was_taken_over_is_not_deleted_by_its_former_owner(tmp_path):
    lock = RunLock(tmp_path)
    write_owner(tmp_path, host="elsewhere")
    lock.release()
    assert (tmp_path / "lock").exists()


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"run_dir={tmp_path}/file cannot be written: .*Not a directory"):
        open_fixed(tmp_path / "file")
