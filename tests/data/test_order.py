"""Slot order v1 against its golden vectors and against a plain-Python reading of its definition."""

import hashlib
import random

import numpy as np
import pytest

from clip_train.data.order import SlotOrder, SourceOrder, key, mix64, mixture_quotas, permutation, source_id
from clip_train.errors import UserError

COUNTS_A = [5, 3, 7, 1, 4]
COUNTS_C = [9000 + 37 * i % 101 for i in range(332)]


def _a() -> SourceOrder:
    return SourceOrder(COUNTS_A, name="train", seed=7, lanes=4, window=3)


def _pairs(order: SourceOrder, positions) -> list[str]:
    shards, indices = order.locate(np.asarray(positions, dtype=np.int64))
    return [f"{s}.{i}" for s, i in zip(shards, indices, strict=True)]


def test_hashes_match_the_golden_vectors():
    hashed = mix64(np.array([0, 1, 2**64 - 1], dtype=np.uint64))
    assert [f"{int(v):016x}" for v in hashed] == ["e220a8397b1dcdaf", "910a2dec89025cc1", "e4d971771b652c20"]
    sid = source_id("train")
    assert f"{sid:016x}" == "db05041dc4546f11"
    assert f"{key(7):016x}" == "63cbe1e459320dd7"
    k1 = key(7, 1, sid, 0)
    assert f"{k1:016x}" == "bbf9ecd7ac29ea48"
    assert permutation(8, k1).tolist() == [4, 7, 1, 5, 3, 0, 6, 2]


def test_two_epochs_of_a_small_source_match_the_golden_vectors():
    epoch_0 = "4.2 1.1 0.2 2.2 4.1 1.2 0.3 2.4 4.0 3.0 2.1 2.3 4.3 0.0 0.4 2.5 1.0 0.1 2.0 2.6"
    epoch_1 = "0.0 4.1 1.1 2.2 0.2 4.0 1.0 2.5 0.1 4.2 1.2 2.4 0.3 3.0 2.0 2.3 0.4 4.3 2.1 2.6"
    assert _pairs(_a(), range(40)) == epoch_0.split() + epoch_1.split()


def test_rows_of_a_batch_across_two_epochs_match_the_golden_vector():
    rows = SlotOrder([_a()], seed=7).global_batch(16, global_batch_size=8)
    assert rows.tolist() == [16, 20, 17, 21, 18, 22, 19, 23]


def test_slots_beyond_2_to_the_53_match_the_golden_vectors():
    order = SourceOrder(COUNTS_C, name="train", seed=0)
    assert order.num_samples == 3_004_537
    slots = [0, 1, 63, 64, 3_004_536, 3_004_537, 10**9, 2**40 + 5, 2**53 + 1]
    expected = "150.8646 129.4204 3.7547 265.6994 122.6451 162.3153 76.8603 130.7234 323.753"
    assert _pairs(order, slots) == expected.split()


def test_two_whole_epochs_of_three_million_samples_match_the_golden_digests():
    order = SourceOrder(COUNTS_C, name="train", seed=0)
    digests = []
    for epoch in range(2):
        positions = np.arange(order.num_samples, dtype=np.int64) + epoch * order.num_samples
        digest = hashlib.sha256()
        # In pieces that keep the windows in use few enough for the tables that are remembered.
        for piece in np.array_split(positions, 40):
            digest.update(np.stack(order.locate(piece), axis=1).astype("<i8").tobytes())
        digests.append(digest.hexdigest())
    assert digests == [
        "1d8ca0ec7ba120fd0a8e96a3a0ed9935c8f8e5bc2dd983e5c9c8e613e2201d13",
        "2d3b753a4002910993c064510ed0b93a92208ea588f3e180a49c073ea70df5ad",
    ]


def test_substitutes_match_the_golden_vector():
    order = SourceOrder(COUNTS_C, name="train", seed=0)
    place = order.places(np.array([1000], dtype=np.int64))
    assert (place.lane[0], place.offset[0], place.size[0]) == (40, 15, 12_288)
    assert _pairs(order, [1000]) == ["83.1793"]
    shards, indices = order.substitutes(1000, global_batch_size=4096)
    expected = "83.5433 83.7205 83.5072 207.6603 207.5207 207.5755 207.7891 207.7739"
    assert [f"{s}.{i}" for s, i in zip(shards, indices, strict=True)] == expected.split()


def test_a_window_shorter_than_nine_rows_per_lane_has_no_substitutes():
    shards, indices = _a().substitutes(0, global_batch_size=8)
    assert len(shards) == len(indices) == 0


def test_random_words_of_a_sample_match_the_golden_vectors():
    words = np.random.Philox(key=[7, 5]).random_raw(64)
    assert [f"{int(w):016x}" for w in words[:4]] == [
        "0c7a36aa38cdd81c", "cf9899f868ceaeaa", "57eb594e16b5d617", "5262bfa8d0f27613",
    ]  # fmt: skip
    assert f"{int(words[63]):016x}" == "1c3f277b269b248e"
    assert float(words[0] >> np.uint64(11)) * 2.0**-53 == 0.0487398305493153
    far = np.random.Philox(key=[7, 2**40 + 5]).random_raw(2)
    assert [f"{int(w):016x}" for w in far] == ["3c76158679beb55e", "ae8de19cb937906e"]


def test_a_mixture_matches_the_golden_vectors():
    assert mixture_quotas([0.5, 0.3, 0.2]) == (2048, 1229, 819)
    assert mixture_quotas([1] * 4096) == (1,) * 4096
    with pytest.raises(UserError, match="4,097 sources; a mixture holds at most 4,096"):
        mixture_quotas([1] * 4097)
    sources = [SourceOrder([10_000], name=name, seed=7) for name in "abc"]
    order = SlotOrder(sources, weights=[0.5, 0.3, 0.2], seed=7)
    dealt, _ = order.route(np.arange(2 * 4096, dtype=np.int64))
    assert dealt[:12].tolist() == [1, 1, 2, 0, 0, 0, 2, 1, 0, 2, 1, 0]
    assert dealt[4096:4108].tolist() == [0, 0, 1, 2, 2, 0, 0, 0, 1, 0, 0, 0]


def test_each_source_of_a_mixture_advances_one_position_at_a_time():
    sources = [SourceOrder([n], name=str(n), seed=3) for n in (50, 7000, 1)]
    order = SlotOrder(sources, weights=[0.2, 0.7999, 0.0001], seed=3, start=1000, bases=[5, 0, 9])
    source, position = order.route(np.arange(1000, 1000 + 3 * 4096, dtype=np.int64))
    for i, base in enumerate([5, 0, 9]):
        mine = position[source == i]
        assert mine.tolist() == list(range(base, base + 3 * order.quotas[i]))
    assert min(order.quotas) == 1


def _locate_as_written(p: int, counts: list[int], *, seed: int, lanes: int, window: int) -> tuple[int, int]:
    """The definition, one position at a time, in Python integers."""
    n, sid = sum(counts), source_id("train")

    def mixed(x: int) -> int:
        return int(mix64(np.array([x], dtype=np.uint64))[0])

    def perm(m: int, k: int) -> list[int]:
        return sorted(range(m), key=lambda i: mixed(i ^ k))

    e, r = divmod(p, n)
    lc = min(lanes, n)
    lane, pos = r % lc, r // lc
    length = n // lc + (lane < n % lc)
    base = lane * (n // lc) + min(lane, n % lc)
    phase = lane * window // lc
    w = (pos + phase) // window
    a, b = max(w * window - phase, 0), min((w + 1) * window - phase, length)
    t = base + a + perm(b - a, key(seed, 2, sid, e, lane, w))[pos - a]
    for shard in perm(len(counts), key(seed, 1, sid, e)):
        if t < counts[shard]:
            return shard, t
        t -= counts[shard]
    raise AssertionError("beyond the epoch")


def _random_layout(rng: random.Random) -> tuple[list[int], int, int]:
    num_shards = rng.choice([1, 1, 2, 5, 17])
    counts = [rng.choice([0, 1, 2, 9, 40]) for _ in range(num_shards)]
    counts[rng.randrange(num_shards)] += 1  # at least one sample
    return counts, rng.choice([1, 2, 3, 7, 64]), rng.choice([1, 2, 5, 16, 32768])


def test_random_layouts_agree_with_the_definition_in_plain_python():
    rng = random.Random(1)
    for _ in range(25):
        counts, lanes, window = _random_layout(rng)
        order = SourceOrder(counts, name="train", seed=11, lanes=lanes, window=window)
        positions = [rng.randrange(3 * sum(counts)) for _ in range(8)]
        shards, indices = order.locate(np.array(positions, dtype=np.int64))
        expected = [_locate_as_written(p, counts, seed=11, lanes=lanes, window=window) for p in positions]
        assert list(zip(shards.tolist(), indices.tolist(), strict=True)) == expected


def check_exactly_once(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    counts, lanes, window = _random_layout(rng)
    n, seed = sum(counts), rng.randrange(2**63)
    source = SourceOrder(counts, name="train", seed=seed, lanes=lanes, window=window)
    everything = {(s, i) for s, c in enumerate(counts) for i in range(c)}
    order = SlotOrder([source], seed=seed)
    batch = rng.randrange(1, n + 1)
    rows = np.concatenate([order.global_batch(c, global_batch_size=batch) for c in range(0, 3 * n, batch)])
    assert np.sort(rows).tolist() == list(range(len(rows)))
    _, shards, indices = order.locate(rows)
    for epoch in range(3):
        mine = rows // n == epoch
        assert mine.sum() == n
        assert set(zip(shards[mine].tolist(), indices[mine].tolist(), strict=True)) == everything


def test_every_sample_comes_exactly_once_per_epoch_in_random_layouts():
    for seed in range(100):
        check_exactly_once(seed)


@pytest.mark.slow
def test_every_sample_comes_exactly_once_per_epoch_in_a_thousand_random_layouts():
    for seed in range(100, 1100):
        check_exactly_once(seed)


def test_a_substitute_is_never_in_the_batch_of_the_sample_it_stands_in_for():
    order = SourceOrder([700, 900], name="train", seed=5, lanes=4, window=100)
    slots = SlotOrder([order], seed=5)
    for consumed in range(0, 1600, 32):
        rows = slots.global_batch(consumed, global_batch_size=32)
        _, shards, indices = slots.locate(rows)
        batch = set(zip(shards.tolist(), indices.tolist(), strict=True))
        for slot in rows.tolist():
            _, s, i = slots.substitutes(slot, global_batch_size=32)
            assert not batch & set(zip(s.tolist(), i.tolist(), strict=True))


@pytest.mark.slow
def test_neighbours_in_a_shard_seldom_meet_in_a_batch_and_almost_never_twice():
    """400 shards of 5,000, batches of 4,096. A full shuffle would put 0.21 % of the neighbours into one batch."""
    shards, per_shard, batch = 400, 5000, 4096
    order = SourceOrder([per_shard] * shards, name="train", seed=0)
    epochs = []
    for epoch in range(2):
        in_batch = np.empty(order.num_samples, dtype=np.int64)
        shards_per_batch = []
        for start in range(0, order.num_samples, batch):
            slots = np.arange(start, min(start + batch, order.num_samples))
            shard, index = order.locate(slots + epoch * order.num_samples)
            in_batch[shard * per_shard + index] = start // batch
            shards_per_batch.append(len(np.unique(shard)))
        same = in_batch[1:] == in_batch[:-1]
        same[per_shard - 1 :: per_shard] = False  # the last of a shard and the first of the next
        epochs.append(same)
        assert same.sum() / (shards * (per_shard - 1)) < 2 * 0.0021
        assert np.mean(shards_per_batch) > 300
    assert (epochs[0] & epochs[1]).sum() / (shards * (per_shard - 1)) < 0.00005
