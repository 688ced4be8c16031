"""A launch that cannot work is refused with the name of what is wrong or missing."""

import os
import socket
import time

import pytest

from clip_train.attempts import Attempt
from clip_train.distributed.collectives import all_reduce
from clip_train.distributed.config import DistributedConfig
from clip_train.distributed.ranks import Ranks, ranks_from_environment
from clip_train.distributed.world import start_world, stop_world
from clip_train.errors import IntegrityError, TrainingFailed, UserError
from clip_train.exit_record import read_exit
from tests.gloo import run_on_ranks

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "TORCHELASTIC_", "OMPI_")


@pytest.fixture
def environment(monkeypatch):
    """Set the launcher's variables, and only those."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)

    def launched(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return launched


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, Ranks(3, 8, 1)),
        ({"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 16, "SLURM_LOCALID": 1}, Ranks(5, 16, 1)),
        # a batch script, which is no task of srun; and torchrun started by srun, once on each host
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 16, "SLURM_LOCALID": 0}, Ranks(0, 1, 0)),
        (
            {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1, "TORCHELASTIC_RUN_ID": 7}
            | {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 0},
            Ranks(9, 16, 1),
        ),
    ],
)
def test_ranks_come_from_torchrun_or_srun(environment, variables, ranks):
    environment(**variables)
    assert ranks_from_environment() == ranks


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": 0, "WORLD_SIZE": 2}, "LOCAL_RANK missing"),
        ({"WORLD_SIZE": 2}, "RANK, LOCAL_RANK missing"),
        ({"RANK": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "RANK=2 must lie in"),
        ({"RANK": "x", "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "must be integers"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "MASTER_ADDR and MASTER_PORT missing"),
        (
            {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
            | {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 1},
            "contradicts itself",
        ),
    ],
)
def test_variables_that_are_missing_or_wrong_are_named(environment, variables, message):
    environment(**variables)
    with pytest.raises(UserError, match=message):
        start_world(device="cpu", arrival_seconds=1)


def test_a_port_that_is_in_use_is_named_with_a_way_out(environment):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} is in use .* --standalone"):
            start_world(device="cpu", arrival_seconds=5)


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "rank 1 of WORLD_SIZE=2 did not come within 1 s"), (1, "rank 0 is missing")]
)
def test_a_rank_that_was_not_started_is_named(environment, port, rank, message):
    environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError, match=message):
        start_world(device="cpu", arrival_seconds=1)
    stop_world()


@pytest.mark.slow
def test_a_server_that_is_no_store_does_not_hold_a_rank_for_ever(environment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=other.getsockname()[1])
        with pytest.raises(UserError, match="rank 0 is missing"):
            start_world(device="cpu", arrival_seconds=1)


def leave_early(world, run_dir, error):
    """Rank 1 leaves after 20 steps, of its own accord or with an error; return what rank 0 hears of it."""
    import torch

    try:
        with Attempt(run_dir) as attempt:
            attempt.join(world, config=DistributedConfig())
            attempt.begin(19)
            all_reduce(torch.ones(1), world=world)
            attempt.stepped(20)
            if world.rank == 1:
                if error is not None:
                    raise error
                return None
            time.sleep(1)
            all_reduce(torch.ones(1), world=world)
    except Exception as heard:
        stop_world()
        return type(heard), str(heard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, (TrainingFailed, "rank 1 left at step 20")),
        (IntegrityError("a.tar is damaged"), (IntegrityError, "rank 1 left at step 20: a.tar is damaged")),
    ],
)
def test_a_rank_that_leaves_early_is_named_by_the_others(tmp_path, error, expected):
    heard, _ = run_on_ranks(leave_early, tmp_path, error)
    assert heard == expected
    record = read_exit(tmp_path)
    assert (record.code, record.reason, record.step) == (expected[0].exit_code, expected[1], 20)
