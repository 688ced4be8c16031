"""Launched runs: stops and deaths leave nothing behind, lose nothing, and are started again only where that helps."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.data.made import numbered_shards
from tests.launched import FLAGS, Job, attempts, require_exact_audit, saved_steps, steps_done
from tests.runs import RunningRanks, arguments_of
from tests.torture.stops import asked_to_stop, chained, rank_stopped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]


def test_five_runs_that_are_asked_to_stop_save_where_they_stand_and_continue_there():
    errors = [outcome.error for outcome in chained(asked_to_stop)(0, 5, 11) if outcome.error]
    assert not errors, "\n".join(errors)


def test_two_jobs_with_a_stopped_rank_end_in_time_and_name_it():
    errors = [outcome.error for outcome in chained(rank_stopped)(0, 2, 12) if outcome.error]
    assert not errors, "\n".join(errors)


def test_a_stopped_rank_that_keeps_the_store_of_the_others_is_named_and_ends(tmp_path):
    shards = numbered_shards(tmp_path / "shards", [130, 45, 225])
    arguments = arguments_of(shards, tmp_path / "run", steps=100000, batch=8)
    running = RunningRanks([*arguments, "distributed.timeout_seconds=5"], tmp_path / "log", ranks=2)  # no launcher
    running.wait_until(lambda: steps_done(tmp_path / "run") >= 3)
    os.kill(running.pids[0], signal.SIGSTOP)
    try:
        running.end_after_a_kill()
    finally:
        running.kill()
    assert re.search(r"rank 0, last seen at step \d+, is stopped, as by SIGSTOP", (tmp_path / "log").read_text())
    require_exact_audit(tmp_path / "run", steps=steps_done(tmp_path / "run"))


def test_no_process_outlives_a_killed_launcher_and_what_they_did_is_saved(tmp_path):
    with Job(tmp_path) as job:
        job.until_step(7)
        workers = job.processes()
        seen = steps_done(job.run_dir)
        job.launcher.kill()
        record = job.end(seconds=40)
        assert len(workers) > 3  # the launcher, two ranks and more
        assert record is not None and record.code == 85 and record.step >= seen, job.said[-3000:]
        assert saved_steps(job.run_dir)[-1] == record.step


def test_torchrun_restarts_a_run_after_the_death_of_a_rank_and_no_sample_is_lost(tmp_path):
    with Job(tmp_path, "steps=60", flags=[*FLAGS, "--max-restarts=1"]) as job:
        job.until_step(13)
        os.kill(job.ranks()[1], signal.SIGKILL)
        record = job.end(seconds=400)
        assert job.launcher.returncode == 0, job.said[-3000:]
        assert record is not None and (record.code, record.step) == (0, 60)
        first, second = attempts(job.run_dir)
        assert first["code"] == 1 and "rank 1, last seen at step 1" in job.said and "is gone" in job.said
        assert 10 <= second["first_step"] <= first["last_step"] and second["code"] == 0
        require_exact_audit(job.run_dir, steps=60)


def test_torchrun_does_not_restart_a_run_that_was_asked_to_stop(tmp_path):
    with Job(tmp_path, flags=[*FLAGS, "--max-restarts=2"]) as job:
        job.until_step(3)
        os.kill(job.ranks()[0], signal.SIGTERM)
        record = job.end(seconds=200)
        assert record is not None and record.code == 85
        assert len(attempts(job.run_dir)) == 1 and steps_done(job.run_dir) == record.step
        assert job.said.count("not started again") >= 2


@pytest.mark.parametrize(("code", "mistake"), [(2, "model.vision.layers=3"), (3, None)])
def test_torchrun_does_not_restart_a_run_that_ends_with_an_error_of_its_input(tmp_path, code, mistake):
    with Job(tmp_path, "steps=3") as job:
        assert job.end(seconds=200).code == 0, job.said[-3000:]
    if mistake is None:
        shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
        shard.write_bytes(shard.read_bytes()[:5000])
    with Job(tmp_path, "steps=6", *([mistake] if mistake else []), flags=[*FLAGS, "--max-restarts=2"]) as job:
        record = job.end(seconds=200)
        assert record is not None and record.code == code, job.said[-3000:]
        assert "not started again" in job.said and 'Traceback (most recent call last):\n  File "clip' not in job.said


@pytest.mark.catalogue(65)
def test_a_second_ctrl_c_leaves_at_once_also_while_the_other_rank_is_silent(tmp_path):
    with Job(tmp_path) as job:
        job.until_step(3)
        zero, one = job.ranks()
        os.kill(one, signal.SIGSTOP)
        time.sleep(2)
        os.kill(zero, signal.SIGINT)
        time.sleep(2)
        os.kill(zero, signal.SIGINT)
        asked = time.monotonic()
        job.until(lambda: "asked to stop for the second time (SIGINT)" in job.said, seconds=10)
        assert time.monotonic() - asked < 10
        os.kill(one, signal.SIGCONT)
        assert job.end(seconds=90) is None
