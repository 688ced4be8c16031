"""After a failed collective the ranks that are missing are named, by what each of them wrote last."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from torch.distributed import HashStore

from clip_train.distributed import roll_call
from clip_train.distributed.hosts import own_host
from clip_train.distributed.ranks import Ranks
from clip_train.distributed.roll_call import RollCall
from clip_train.errors import TrainingFailed, UserError

CLOSED = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:53410")
LATE = RuntimeError("[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv")

CUT_OFF = RuntimeError("Application timeout caused pair closure")


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks at step 20 that have checked in."""
    monkeypatch.setattr(roll_call, "SECONDS_OF_SILENCE", 0.4)
    monkeypatch.setattr(roll_call, "SECONDS_BETWEEN_SIGNS", 0.05)
    store = HashStore()
    calls = [RollCall(store, ranks=Ranks(rank, 3, rank)) for rank in range(3)]
    for rank in range(3):
        store.set(f"here/{rank}", "3")
    for call in calls:
        call.check_in(seconds=1)
        call.step = 20
    yield calls
    for call in calls:
        call.leave(code=0, reason="", followed=False)


def test_an_error_that_is_no_failed_collective_stays_what_it_is(ranks):
    assert ranks[0].explain(ValueError("no")) is None


def test_a_rank_that_left_is_named_with_its_reason_and_its_exit_code(ranks):
    ranks[2].leave(code=1, reason="rank 1 left at step 20", followed=True)
    ranks[1].leave(code=2, reason="no such file", followed=False)
    error = ranks[0].explain(CLOSED)
    assert isinstance(error, UserError)
    assert str(error) == "rank 1 left at step 20: no such file"


def test_a_rank_that_left_without_an_error_is_named(ranks):
    ranks[1].leave(code=0, reason="finished", followed=False)
    error = ranks[0].explain(CLOSED)
    assert isinstance(error, TrainingFailed)
    assert str(error) == "rank 1 left at step 20"


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (CLOSED, "is gone: killed"),
        (LATE, "gives no sign of life: it hangs"),
        (CUT_OFF, "gives no sign of life: it hangs"),
    ],
)
def test_a_rank_that_gives_no_sign_of_life_is_named_and_one_that_does_is_not(ranks, failure, text):
    ranks[2].start()
    error = ranks[0].explain(failure)
    assert str(error).startswith(f"rank 1, last seen at step 19, {text}")
    assert "rank 2" not in str(error)


def test_when_all_ranks_live_the_failure_itself_is_told(ranks):
    ranks[1].start()
    ranks[2].start()
    assert "no longer reach each other: " in str(ranks[0].explain(CLOSED))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_stopped_rank_is_named_and_woken(ranks):
    ranks[2].start()
    with subprocess.Popen(["sleep", "0.05"]) as process:
        ranks[0]._store.set("process/1", f'["{own_host()}", {process.pid}]')
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert "rank 1, last seen at step 19, is stopped" in str(ranks[0].explain(LATE))
        assert process.wait(10) == 0


def test_ranks_that_did_not_come_or_came_twice_are_named():
    store = HashStore()
    with pytest.raises(UserError, match=r"ranks 1, 2 of WORLD_SIZE=3 did not come within 0 s"):
        RollCall(store, ranks=Ranks(0, 3, 0)).check_in(seconds=0.2)
    with pytest.raises(UserError, match="several processes have RANK=0"):
        RollCall(store, ranks=Ranks(0, 3, 0)).check_in(seconds=0.2)


def test_ranks_that_were_started_for_different_sizes_are_refused():
    store = HashStore()
    for rank in (1, 2):
        store.set(f"here/{rank}", "4")
    with pytest.raises(UserError, match=r"different WORLD_SIZE: \[3, 4, 4\]"):
        RollCall(store, ranks=Ranks(0, 3, 0)).check_in(seconds=1)
