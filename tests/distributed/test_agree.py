"""What rank 0 does, every rank learns: results, errors, and that it is still at work."""

import time

import pytest

from clip_train.distributed import agree, collectives
from clip_train.distributed.agree import on_main
from clip_train.distributed.world import World
from clip_train.errors import ClipTrainError, IntegrityError
from tests.gloo import run_on_ranks


def caught(act, *, world):
    try:
        return on_main(act, world=world)
    except Exception as error:
        return type(error), str(error)


def outcomes(world):
    """A result, an error of ours and one of others, on this rank; how often the ranks exchanged a word."""
    calls, messages = [], []
    agree.SECONDS_BETWEEN_SIGNS = 0.05
    broadcast = collectives.broadcast_object

    def counted(value, **arguments):
        messages.append(value)
        return broadcast(value, **arguments)

    def slow():
        calls.append(world.rank)
        time.sleep(0.4)
        return "done"

    def damaged():
        raise IntegrityError("a.tar is damaged")

    collectives.broadcast_object = counted
    result = on_main(slow, world=world)
    return result, calls, len(messages), caught(damaged, world=world), caught(lambda: 1 // 0, world=world)


def test_every_rank_gets_the_result_or_the_error_and_hears_from_a_slow_rank_0_meanwhile():
    (first, *main), (second, *other) = run_on_ranks(outcomes)
    assert first == second == "done"
    assert main[0] == [0] and other[0] == []
    assert main[1] == other[1] > 3
    assert main[2] == other[2] == (IntegrityError, "a.tar is damaged")
    assert main[3] == (ZeroDivisionError, "integer division or modulo by zero")
    assert other[3] == (ClipTrainError, f"rank 0: {ZeroDivisionError(main[3][1])!r}")


def test_one_process_acts_itself():
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 // 0, world=World())
