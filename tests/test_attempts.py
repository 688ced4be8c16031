"""What a run directory knows of its attempts: how the newest one ended, and what all have cost."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from clip_train.attempts import Attempt, attempts_so_far, read_attempts
from clip_train.checkpoint.lock import RunLock
from clip_train.data.audit import AuditTrail
from clip_train.distributed.config import DistributedConfig
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, Preempted, TrainingFailed, UserError
from clip_train.exit_record import ExitRecord, ended_before, read_exit


def go(run_dir: Path, *, first: int, last: int, error: BaseException | None = None, reason=StopReason.none) -> None:
    """Live through one attempt."""
    with Attempt(run_dir) as attempt:
        attempt.join(World(), config=DistributedConfig())
        attempt.begin(first)
        assert read_exit(run_dir) is None  # of a run under way
        for step in range(first + 1, last + 1):
            attempt.stepped(step)
        if error is None or isinstance(error, Preempted):
            attempt.finish(reason)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "reason", "code", "text"),
    [
        (None, StopReason.none, 0, "finished"),
        (None, StopReason.time_limit, 0, "stopped: time limit"),
        (Preempted("saved"), StopReason.preempted, 85, "stopped: preempted"),
        (UserError("no such key\nand more"), StopReason.none, 2, "no such key"),
        (IntegrityError("bad shard"), StopReason.none, 3, "bad shard"),
        (TrainingFailed("not finite"), StopReason.none, 1, "not finite"),
        (ZeroDivisionError("division by zero"), StopReason.none, 1, "ZeroDivisionError('division by zero')"),
    ],
)
def test_every_end_is_written_down_with_its_code_reason_and_step(tmp_path, error, reason, code, text):
    if error is None:
        go(tmp_path, first=3, last=7, reason=reason)
    else:
        with pytest.raises(type(error)):
            go(tmp_path, first=3, last=7, error=error, reason=reason)
    record = read_exit(tmp_path)
    assert (record.code, record.reason, record.step) == (code, text, 7)
    (line,) = read_attempts(tmp_path)
    assert (line.first_step, line.last_step, line.code, line.world) == (3, 7, code, 1)
    assert line.end == record.time and line.host == socket.gethostname()


def test_attempts_add_up_and_one_that_was_killed_ends_with_its_last_step(tmp_path):
    killed = Attempt(tmp_path).__enter__()
    killed.join(World(), config=DistributedConfig())
    killed.begin(0)
    audit = AuditTrail(tmp_path, step=0)
    audit.write(4, id_hash=1)
    audit.close()
    assert read_exit(tmp_path) is None
    noted = time.time() - 3600  # killed an hour ago: what it cost does not grow since then
    os.utime(tmp_path / "audit.bin", (noted, noted))
    (told,) = attempts_so_far(tmp_path)
    assert (told.last_step, told.end, told.device_hours) == (4, told.start, 0)
    go(tmp_path, first=3, last=9)
    first, second = read_attempts(tmp_path)
    assert (first.first_step, first.last_step, first.code) == (0, 4, None)
    assert first.start <= first.end <= second.start
    assert (second.first_step, second.last_step, second.code) == (3, 9, 0)
    assert 0 <= first.device_hours < 0.1


def test_the_end_of_a_run_that_another_process_holds_is_not_written(tmp_path):
    holder = os.fork()
    if not holder:
        RunLock(tmp_path)
        signal.pause()
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    with pytest.raises(UserError), Attempt(tmp_path):
        raise UserError("in use")
    assert read_exit(tmp_path) is None
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with pytest.raises(UserError), Attempt(tmp_path):
        raise UserError("another mistake")
    assert read_exit(tmp_path).code == 2


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_rank_of_any_launcher_writes_the_end(tmp_path, monkeypatch, variable):
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(TrainingFailed), Attempt(tmp_path):
            raise TrainingFailed("before the ranks met")
        assert (read_exit(tmp_path) is not None) == written


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*run cannot be written"), Attempt(tmp_path / "run"):
        pass


def test_a_mistake_before_the_run_had_a_directory_leaves_none(tmp_path):
    with pytest.raises(UserError), Attempt(tmp_path / "run"):
        raise UserError("no data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "job_restarts", "stays_ended"),
    [
        (85, 1, 0, True), (0, 1, 0, True), (2, 3, 0, True), (3, 1, 0, True),
        (1, 1, 0, False), (70, 1, 0, False),  # a crash and a hang are what restarts are for
        (85, 0, 0, False),  # the first start of a launch
        (85, 1, 1, False),  # the same job, requeued
    ],
)  # fmt: skip
def test_a_restarted_rank_leaves_where_its_launch_has_ended(
    tmp_path, monkeypatch, code, restarts, job_restarts, stays_ended
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(SystemExit), Attempt(tmp_path):
        raise SystemExit(code)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(job_restarts))
    record = ended_before(tmp_path)
    assert (record is not None) == stays_ended
    assert record is None or (isinstance(record, ExitRecord) and record.code == code)
