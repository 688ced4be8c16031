"""Bad samples over ranks, workers and restarts: same substitutes, exact counts, one decision for all ranks."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

from clip_train.data.bad import BadSample, BadSamples, cut_ledgers, read_ledger
from clip_train.data.delivery import StepExchange
from clip_train.data.order import SourceOrder
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError
from tests.data.made import numbered_shards, steps, stream
from tests.gloo import run_on_ranks

COUNTS = [70, 30, 100]
BAD = set(random.Random(5).sample(range(sum(COUNTS)), 10))  # 5 %
OPTIONS = {"lanes": 2, "window": 80, "max_bad_fraction": 1.0}
STEPS, SAVED = 60, 22  # more than two epochs


def _fetch(world, folder, run_dir, workers, done, count, state, kill=False):
    """Rows and state as plain values after `count` steps of 8 samples."""
    training_stream = stream(folder, world, workers=workers, **OPTIONS)
    if state is not None:
        training_stream.load_state_dict(state)
    batches = steps(training_stream, world, run_dir, done=done, count=count // 2)
    if kill:
        others = set(multiprocessing.active_children())
        iterator = training_stream.batches(8 * (done + count // 2))
        next(iterator)
        for process in set(multiprocessing.active_children()) - others:
            os.kill(process.pid, signal.SIGKILL)
            break
    batches += steps(training_stream, world, run_dir, done=done + count // 2, count=count - count // 2)
    rows = [[tensor.numpy() for tensor in batch] for batch in batches]
    return rows, training_stream.state_dict(8 * (done + count))


def _joined(ranks) -> list[list[np.ndarray]]:
    by_step = zip(*(rows for rows, _ in ranks), strict=True)
    return [[np.concatenate(column) for column in zip(*pieces, strict=True)] for pieces in by_step]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return bad_shards(tmp_path_factory.mktemp("shards"))


def bad_shards(folder):
    return numbered_shards(folder, COUNTS, bad=BAD)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    return undisturbed(shards, tmp_path_factory.mktemp("alone"))


def undisturbed(shards, run_dir):
    """Return rows, state and ledger of one process that nothing happens to."""
    rows, state = _fetch(World(), shards, run_dir, 0, 0, STEPS, None)
    return rows, state, read_ledger(run_dir)


def test_the_ledger_and_the_counts_hold_every_occurrence_of_a_bad_sample(alone):
    _, state, ledger = alone
    order = SourceOrder(COUNTS, name="train", seed=7, lanes=2, window=80)
    shards, indices = order.locate(np.arange(8 * STEPS))
    slots = [g for g, number in enumerate(np.cumsum([0, *COUNTS])[shards] + indices) if number in BAD]
    assert [row["g"] for row in ledger] == slots and len(slots) >= 2 * len(BAD)
    assert state["bad"] == {"unknown_format": len(slots)}
    assert all(row["step"] == row["g"] // 8 + 1 for row in ledger)
    assert {row["k"] for row in ledger} >= {1}


def _through_a_kill(world, folder, run_dir, workers):
    """Save after some steps, go on, come back to the save as after a kill, lose a worker, and reach the end."""
    rows, state = _fetch(world, folder, run_dir, workers, 0, SAVED, None)
    state = json.loads(json.dumps(state))
    _fetch(world, folder, run_dir, workers, SAVED, 6, state)
    later, state = _fetch(world, folder, run_dir, workers, SAVED, STEPS - SAVED, state, kill=workers > 0)
    return rows + later, state


def check_substitutes(shards, alone, run_dir, *, size: int, workers: int) -> None:
    expected_rows, expected_state, expected_ledger = alone
    ranks = run_on_ranks(_through_a_kill, shards, run_dir, workers, world_size=size, workers=workers > 0)
    assert all(state == expected_state for _, state in ranks)
    assert read_ledger(run_dir) == expected_ledger
    for step, expected in zip(_joined(ranks), expected_rows, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(step, expected, strict=True))


def test_two_ranks_show_the_same_substitutes_and_count_exactly_through_a_kill(shards, alone, tmp_path):
    check_substitutes(shards, alone, tmp_path, size=2, workers=0)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 2), (2, 2), (4, 0), (4, 2)])
def test_any_ranks_and_workers_show_the_same_substitutes_and_count_exactly(shards, alone, tmp_path, size, workers):
    check_substitutes(shards, alone, tmp_path, size=size, workers=workers)


def _fetch_and_lose_a_shard(world, folders, run_dir):
    """Each rank reads its own folder; from that of rank 1 a shard vanishes after it was opened."""
    training_stream = stream(folders[world.rank], world, **OPTIONS)
    if world.rank == 1:
        (folders[1] / "s-002.tar").unlink()
    begun = time.monotonic()
    try:
        steps(training_stream, world, run_dir, count=STEPS)
    except IntegrityError as error:
        return str(error), time.monotonic() - begun
    return "nothing was raised", 0.0


def test_damage_that_one_rank_meets_stops_all_ranks_with_its_error(shards, tmp_path):
    damaged = numbered_shards(tmp_path / "damaged", COUNTS, bad=BAD)
    stream(damaged, World())  # makes the index
    (first, waited), (second, _) = run_on_ranks(_fetch_and_lose_a_shard, (shards, damaged), tmp_path)
    assert first == second and "s-002.tar, sample" in first
    assert waited < 20


def _one_wants_to_stop(world, folder, run_dir):
    training_stream = stream(folder, world, **OPTIONS)
    exchange = StepExchange(
        training_stream, batches=training_stream.batches(0), run_dir=run_dir, world=world, step=0, consumed=0
    )
    seen = []
    for step in range(1, 6):
        wanted = StopReason.preempted if (world.rank, step) == (1, 4) else StopReason.none
        delivery = exchange.next(step=step, stop=wanted)
        seen.append((delivery.batch is not None, delivery.stop))
        if delivery.batch is None:
            break
    exchange.close()
    return seen, training_stream.counters()


def test_a_stop_wanted_by_one_rank_stops_all_before_the_same_step_and_counts_nothing_of_it(shards, tmp_path):
    (first, counts), (second, _) = run_on_ranks(_one_wants_to_stop, shards, tmp_path)
    assert first == second == [(True, StopReason.none)] * 3 + [(False, StopReason.preempted)]
    assert sum(counts.values()) == len([row for row in read_ledger(tmp_path) if row["g"] < 24])
    assert (tmp_path / "audit.bin").stat().st_size == 3 * 8


def _bad(slot: int) -> BadSample:
    return BadSample(slot, "train", "a.tar", slot, f"a.tar/{slot}", "undecodable", None)


def test_the_limits_look_at_the_last_ten_thousand_samples_and_at_neighbours_in_the_order():
    samples = BadSamples(0.01)
    for step in range(40):  # 100 bad ones in 10,000, again and again, are just allowed
        samples.add([_bad(1000 * step + 7 * i) for i in range(10)], num_samples=1000)
    with pytest.raises(
        IntegrityError, match=r"^101 of the last 10000 samples cannot be used.*The first: a\.tar/0: und"
    ):
        samples.add([_bad(1000 * 40 + 7 * i) for i in range(11)], num_samples=1000)
    samples = BadSamples(1.0)
    samples.add([_bad(slot) for slot in reversed(range(50, 100))], num_samples=100)
    with pytest.raises(IntegrityError, match="100 samples in a row"):
        samples.add([_bad(slot) for slot in range(100, 150)], num_samples=100)


def test_the_ledger_loses_an_unfinished_line_and_what_came_after_the_save(tmp_path):
    (tmp_path / "bad").mkdir()
    lines = [json.dumps({"step": g // 8 + 1, "g": g}) + "\n" for g in (3, 9, 15, 16)]
    (tmp_path / "bad" / "rank-000.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "bad" / "rank-003.jsonl").write_text("".join(lines[2:]) + '{"step": 4, "g"')
    cut_ledgers(tmp_path, consumed=16)
    assert [row["g"] for row in read_ledger(tmp_path)] == [3, 9, 15]
