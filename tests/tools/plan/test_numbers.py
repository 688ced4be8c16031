"""Traffic against collectives that are carried out by hand; time against counting; steady steps in invented rows."""

import numpy as np
import pytest

from clip_train.errors import UserError
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.starting_point import check_batch
from clip_train.tools.plan.duration import ASSUMED_MFU, assumed_time, measured_time, times_due
from clip_train.tools.plan.probe import steady_steps
from clip_train.tools.plan.traffic import step_traffic
from clip_train.train import due
from tests.tools.plan.plans import probe_result, run_config


class Ring:
    """Carries out collectives over neighbours, and counts the bytes that rank 0 sends."""

    def __init__(self, ranks):
        self.ranks, self.sent = ranks, 0

    def reduce_scatter(self, rows):
        """rows: [ranks, ranks, n], what each rank has for each; returns [ranks, n]."""
        carried = [rows[r, (r - 1) % self.ranks] for r in range(self.ranks)]
        for hop in range(1, self.ranks):
            self.sent += carried[0].nbytes
            arrived = [carried[(r - 1) % self.ranks] for r in range(self.ranks)]
            carried = [arrived[r] + rows[r, (r - 1 - hop) % self.ranks] for r in range(self.ranks)]
        return np.stack([carried[(r) % self.ranks] for r in range(self.ranks)])

    def all_gather(self, own):
        """own: [ranks, n]; returns what every rank then has, [ranks, ranks, n]."""
        have = [{r: own[r]} for r in range(self.ranks)]
        for hop in range(self.ranks - 1):
            self.sent += have[0][(-hop) % self.ranks].nbytes
            moving = [((r - hop) % self.ranks, have[r][(r - hop) % self.ranks]) for r in range(self.ranks)]
            for r, (place, part) in enumerate(moving):
                have[(r + 1) % self.ranks][place] = part
        return np.stack([[rows[r] for r in range(self.ranks)] for rows in have])

    def all_reduce(self, values):
        """values: [ranks, n], n a multiple of the ranks; returns the sums on every rank."""
        parts = values.reshape(self.ranks, self.ranks, -1)
        return self.all_gather(self.reduce_scatter(parts)).reshape(self.ranks, -1)


@pytest.mark.parametrize(("ranks", "short"), [(2, False), (8, True)])
def test_traffic_is_that_of_collectives_between_neighbours(ranks, short):
    config = run_config(f"precision={'bf16' if short else 'fp32'}", "loss.duplicates=ignore")
    trained, batch, width = 8 * 1000, config.global_batch_size, config.model.embed_dim
    rng, kind = np.random.default_rng(0), np.float16 if short else np.float32
    found = step_traffic(config, trained=trained, parameters=trained, ranks=ranks)

    gradients = Ring(ranks)
    values = rng.integers(0, 9, (ranks, trained)).astype(np.float32)
    assert np.array_equal(gradients.all_reduce(values), np.tile(values.sum(0), (ranks, 1)))
    assert found.gradients == gradients.sent

    captions = Ring(ranks)
    own = rng.integers(0, 9, (ranks, batch // ranks * width)).astype(kind)
    assert np.array_equal(captions.all_gather(own)[0], own)
    assert found.captions == captions.sent

    returned = Ring(ranks)
    rows = rng.integers(0, 9, (ranks, ranks, batch // ranks * width)).astype(np.float32)
    returned.reduce_scatter(rows)
    assert found.caption_gradients == returned.sent

    sums = Ring(ranks)
    sums.all_gather(np.zeros((ranks, batch // ranks), dtype=np.uint8))
    sums.all_gather(np.zeros((ranks, batch // ranks), dtype=np.int64))
    sums.all_gather(np.zeros((ranks, 2 * batch), dtype=np.float32))
    scalars = found.sums - sums.sent
    assert 0 < scalars < 8 * 8


def test_sharded_weights_travel_too_and_replicas_exchange_their_share_only():
    whole = run_config("distributed.strategy=fsdp", "precision=bf16")
    parts = run_config("distributed.strategy=fsdp", "precision=bf16", "distributed.shard_ranks=2")
    trained = 8 * 1000
    sharded = Ring(8)
    sharded.reduce_scatter(np.zeros((8, 8, trained // 8), dtype=np.float32))
    assert step_traffic(whole, trained=trained, parameters=trained, ranks=8).gradients == sharded.sent
    pair, across = Ring(2), Ring(4)
    pair.reduce_scatter(np.zeros((2, 2, trained // 2), dtype=np.float32))
    across.all_reduce(np.zeros((4, trained // 2), dtype=np.float32))
    found = step_traffic(parts, trained=trained, parameters=trained, ranks=8)
    assert found.gradients == pair.sent + across.sent
    gathered = Ring(2)
    gathered.all_gather(np.zeros((2, trained // 2), dtype=np.float16))
    assert found.weights == 2 * gathered.sent


def test_one_rank_sends_nothing():
    assert step_traffic(run_config(), trained=10**6, parameters=10**6, ranks=1).total == 0


@pytest.mark.parametrize("every", [None, 0, 1, 7, 50, 100, 300])
def test_periodic_actions_are_counted_as_training_takes_them(every):
    assert times_due(every=every, steps=100) == sum(due(step, every=every, total=100) for step in range(1, 101))


def test_time_is_what_was_measured_times_how_often_it_happens():
    val = RetrieveConfig(name="retrieve", shards="x", every=30)
    config = run_config("checkpoint.every=20", evaluation={"val": val})
    found = probe_result()
    fixed = 30.0 - 12 * 0.5 - 2 * 0.25 - 3.0
    time = measured_time(config, steps=100, found=found)
    assert (time.fixed, time.steps, time.evaluations, time.saves) == (fixed, 50.0, 4 * 8.0, 4 * 0.25)
    guess = assumed_time(steps=100, flops_per_step=1e12, peak_flops=1e14)
    assert guess.total == pytest.approx(100 * 0.01 / ASSUMED_MFU)


def test_steady_steps_leave_out_the_warm_up_and_find_what_a_save_costs():
    seconds = [3.0, 1.0, 0.5, 0.5, 0.75, 0.5, 0.5, 0.5, 0.85]
    rows = [
        {"step": 2 * (i + 1), "perf/step_seconds": value, "perf/data_wait": 0.1 if i > 1 else 0.9}
        for i, value in enumerate(seconds)
    ]
    found = steady_steps(rows, save_every=8)
    assert found.step_seconds == pytest.approx(0.5)
    assert found.save_seconds == pytest.approx(2 * (0.25 + 0.35) / 2)
    assert found.data_wait == pytest.approx(0.1)
    alone = steady_steps(rows[:1], save_every=8)
    assert (alone.step_seconds, alone.save_seconds) == (3.0, 0.0)


@pytest.mark.parametrize(
    ("override", "ranks", "expected"),
    [("seed=1", 3, "nearest 63 or 66"), ("micro_batch_size=47", 1, "must divide the 64 pairs of .*: nearest 32")],
)
def test_a_batch_that_cannot_be_cut_is_refused(override, ranks, expected):
    with pytest.raises(UserError, match=expected):
        check_batch(run_config(override), ranks=ranks)
