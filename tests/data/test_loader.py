"""The training stream against the order computed directly, over ranks, workers, epochs and bad samples."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_train.data.config import DataConfig
from clip_train.data.images.transforms import random_crop, sample_uniforms
from clip_train.data.order import SlotOrder, SourceOrder
from clip_train.data.shards.index import index_source
from clip_train.data.tasks import TaskSampler
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from tests.data.made import ByteTokenizer, caption_of, encoded, numbered_shards, picture, steps, stream, write_shard

COUNTS = [5, 3, 7, 1, 4]


def _take(training_stream, consumed: int, count: int) -> list:
    return list(itertools.islice(training_stream.batches(consumed), count))


def _equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _numbers(batch) -> list[int]:
    return [int(caption_of(tokens).split()[1]) for tokens in batch.tokens]


def test_each_slot_shows_the_sample_the_order_names_over_two_epochs(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    order = SourceOrder(COUNTS, name="train", seed=7, lanes=4, window=6)
    first_number = np.cumsum([0, *COUNTS])
    seen = {}
    for batch in _take(stream(tmp_path, World()), 0, 5):
        assert batch.images.shape == (8, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.valid.all() and batch.lengths.tolist() == [len(f"n {n}") + 2 for n in _numbers(batch)]
        seen |= dict(zip(batch.slots.tolist(), _numbers(batch), strict=True))
    shards, indices = order.locate(np.arange(40))
    assert seen == dict(enumerate((first_number[shards] + indices).tolist()))
    assert sorted(seen[slot] for slot in range(20)) == sorted(seen[slot] for slot in range(20, 40)) == list(range(20))


def test_pixels_are_the_crop_that_the_slot_draws(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    (batch,) = _take(stream(tmp_path, World(), seed=5), 0, 1)
    for row, slot, number in zip(batch.images, batch.slots.tolist(), _numbers(batch), strict=True):
        image = picture(number)
        top, left, height, width = random_crop(18, 20, uniforms=sample_uniforms(5, slot), scale=(0.9, 1.0))
        crop = image.crop((left, top, left + width, top + height)).resize((16, 16), resample=3)
        assert np.abs(row.numpy().astype(int) - np.asarray(crop)).max() <= 1


def test_the_ranks_together_see_the_rows_of_one_process_at_any_number_of_ranks(tmp_path):
    numbered_shards(tmp_path, COUNTS, bad={3, 11})
    options = {"batch": 12, "max_bad_fraction": 1.0}
    whole = _take(stream(tmp_path, World(), **options), 0, 3)
    for size in (2, 3, 4):
        pieces = [_take(stream(tmp_path, World(rank=rank, size=size), **options), 0, 3) for rank in range(size)]
        for step, batch in enumerate(whole):
            joined = [torch.cat(tensors) for tensors in zip(*(piece[step] for piece in pieces), strict=True)]
            assert _equal(batch, joined)


def _check_ranks(num_layouts: int) -> None:
    """Cut random batches of random mixtures over many numbers of ranks; joined they are the global batch."""
    rng = random.Random(3)
    for _ in range(num_layouts):
        sources = [
            SourceOrder(
                [rng.choice([0, 1, 9, 40]) for _ in range(rng.choice([1, 5, 17]))] + [rng.randrange(1, 60)],
                name=str(i), seed=4, lanes=rng.choice([1, 2, 3, 7, 64]), window=rng.choice([1, 2, 5, 16, 32768]),
            )
            for i in range(rng.choice([1, 1, 2, 3]))
        ]  # fmt: skip
        order = SlotOrder(sources, seed=4)
        batch, start = 24 * rng.choice([1, 2, 40]), rng.randrange(3000)
        expected = [order.global_batch(start + i * batch, global_batch_size=batch) for i in range(2)]
        assert np.array_equal(np.sort(np.concatenate(expected)), np.arange(start, start + 2 * batch))
        for size in (1, 2, 3, 4, 6, 8):
            pieces = []
            for rank in range(size):
                sampler = TaskSampler(order, world=World(rank=rank, size=size), global_batch_size=batch, start=start)
                tasks = list(itertools.islice(sampler, 2 * sampler.tasks_per_batch))
                assert all(len(task.slots) <= 256 for task in tasks)
                pieces += [(task.consumed, rank, task.slots) for task in tasks]
            for i, whole in enumerate(expected):
                own = [slots for consumed, _, slots in pieces if consumed == start + i * batch]
                assert np.array_equal(np.concatenate(own), whole)


def test_random_layouts_give_the_same_batches_at_any_number_of_ranks():
    _check_ranks(50)


@pytest.mark.slow
def test_a_thousand_random_layouts_give_the_same_batches_at_any_number_of_ranks():
    _check_ranks(1000)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [0, 1, 2])
def test_any_number_of_ranks_and_workers_shows_the_same_batches(tmp_path, layout):
    rng = random.Random(layout)
    counts = [rng.randrange(1, 60) for _ in range(5)]
    bad = set(rng.sample(range(sum(counts)), sum(counts) // 20))
    options = {"batch": 24, "lanes": rng.choice([1, 3, 64]), "window": rng.choice([2, 40, 32768])}
    numbered_shards(tmp_path, counts, bad=bad)
    expected = _take(stream(tmp_path, World(), **options), 0, 12)
    for workers in (0, 1, 2, 3, 5):
        for size in (1, 2, 3, 4, 6, 8) if workers in (0, 2) else (1,):
            pieces = []
            for rank in range(size):
                part = stream(tmp_path, World(rank=rank, size=size), workers=workers, **options)
                pieces.append(_take(part, 0, 12))
                part.close()
            for step, batch in enumerate(expected):
                joined = [torch.cat(tensors) for tensors in zip(*(piece[step] for piece in pieces), strict=True)]
                assert _equal(batch, joined), (workers, size, step)


def test_workers_change_nothing_and_a_resume_continues_at_the_very_sample(tmp_path):
    numbered_shards(tmp_path, COUNTS, bad={6})
    expected = _take(stream(tmp_path, World()), 0, 8)
    loaded = stream(tmp_path, World(), workers=2)
    assert all(_equal(a, b) for a, b in zip(_take(loaded, 0, 8), expected, strict=True))
    # Before, at and after the end of the first epoch, which lies inside the third batch.
    for step in (1, 2, 3, 5):
        resumed = _take(loaded, 8 * step, 2)
        assert all(_equal(a, b) for a, b in zip(resumed, expected[step : step + 2], strict=True))
    loaded.close()


def test_a_batch_of_several_tasks_keeps_its_rows_in_order(tmp_path):
    numbered_shards(tmp_path, [700])
    (batch,) = _take(stream(tmp_path, World(), batch=600, lanes=8, window=50), 0, 1)
    order = SourceOrder([700], name="train", seed=7, lanes=8, window=50)
    assert batch.slots.tolist() == sorted(range(600), key=lambda slot: (slot % 8, slot))
    assert _numbers(batch) == order.locate(batch.slots.numpy())[1].tolist()


@pytest.mark.parametrize("on_bad", ["substitute", "mask"])
def test_a_bad_sample_keeps_its_place_and_moves_no_other(tmp_path, on_bad):
    counts, options = [120, 80], {"lanes": 2, "window": 100, "on_bad": on_bad}
    bad = {10, 11, 12, 77, 150}
    clean = _take(stream(numbered_shards(tmp_path / "clean", counts), World(), **options), 0, 25)
    damaged = stream(numbered_shards(tmp_path / "damaged", counts, bad=bad), World(), **options)
    order = SourceOrder(counts, name="train", seed=7, lanes=2, window=100)
    for good, batch in zip(clean, steps(damaged, World(), tmp_path, count=25), strict=True):
        assert torch.equal(good.slots, batch.slots)
        for row, number in enumerate(_numbers(good)):
            if number not in bad:
                assert torch.equal(good.images[row], batch.images[row]) and batch.valid[row]
            elif on_bad == "mask":
                assert not batch.valid[row] and not batch.images[row].any() and not batch.tokens[row].any()
            else:
                shards, indices = order.substitutes(int(batch.slots[row]), global_batch_size=8)
                tried = [0 if s == 0 else 120 for s in shards] + indices
                assert batch.valid[row]
                assert _numbers(batch)[row] == next(int(n) for n in tried if int(n) not in bad)
    assert damaged.counters() == {"unknown_format": 5}


def test_bad_captions_are_counted_by_reason(tmp_path):
    captions = [b"", b" \n", b"\xff\xfe", b"x" * 70_000, *[b"n %d" % i for i in range(4)]]
    content = encoded(picture(0))
    write_shard(tmp_path / "a.tar", [{"__key__": str(i), "png": content, "txt": c} for i, c in enumerate(captions)])
    training_stream = stream(tmp_path, World())
    (batch,) = steps(training_stream, World(), tmp_path, count=1)
    assert batch.valid.sum() == 4
    assert training_stream.counters() == {"caption_empty": 2, "caption_not_utf8": 1, "caption_too_long": 1}


def test_too_many_bad_samples_stop_the_run_and_are_named(tmp_path):
    numbered_shards(tmp_path / "few", [300], bad=set(range(0, 300, 4)))
    with pytest.raises(IntegrityError, match=r"21 of the last \d+ samples .*s-000\.tar/\d+\.png: unknown_format"):
        steps(stream(tmp_path / "few", World(), batch=1, max_bad_fraction=0.002), World(), tmp_path, batch=1, count=300)
    numbered_shards(tmp_path / "all", [120], bad=set(range(120)))
    with pytest.raises(IntegrityError, match="100 samples in a row"):
        steps(stream(tmp_path / "all", World(), max_bad_fraction=1.0), World(), tmp_path, count=15)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_is_one_clear_error(tmp_path, workers):
    numbered_shards(tmp_path, COUNTS)
    training_stream = stream(tmp_path, World(), workers=workers)
    (tmp_path / "s-002.tar").unlink()
    with pytest.raises(IntegrityError, match=r"^\S*s-002\.tar, sample \d+: .*No such file"):
        _take(training_stream, 0, 4)
    training_stream.close()


def test_an_uneven_global_batch_names_the_nearest_sizes_that_work(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    with pytest.raises(UserError, match=r"global_batch_size=10 .* multiple of the 4 processes: nearest 8 or 12"):
        DataConfig(train=str(tmp_path)).build_train(
            world=World(size=4), seed=0, global_batch_size=10, tokenizer=ByteTokenizer(), image_size=16
        )


def test_fewer_samples_than_a_batch_are_refused(tmp_path):
    numbered_shards(tmp_path, COUNTS)
    write_shard(tmp_path / "empty" / "a.tar", [])
    numbered_shards(tmp_path / "empty", [1])
    index_source(str(tmp_path / "empty"))
    sources = {"a": {"shards": f"{tmp_path}/*.tar"}, "b": {"shards": f"{tmp_path}/empty/a.tar"}}
    config = DataConfig(train=sources, workers=0)
    with pytest.raises(UserError, match=r"there is no sample in the shards of b$"):
        config.build_train(world=World(), seed=7, global_batch_size=4, tokenizer=ByteTokenizer(), image_size=16)
    with pytest.raises(UserError, match=r"global_batch_size=21 .* 20 samples"):
        stream(tmp_path, World(), batch=21)


def test_the_state_is_small_the_same_on_all_ranks_and_refuses_other_data(tmp_path):
    numbered_shards(tmp_path / "a", COUNTS)
    numbered_shards(tmp_path / "b", [5, 3, 7, 1, 5])
    state = stream(tmp_path / "a", World()).state_dict(24)
    assert state == stream(tmp_path / "a", World(rank=1, size=2)).state_dict(24)
    assert state["consumed"] == 24 and state["order"] == "v1" and len(json.dumps(state)) < 2048
    stream(tmp_path / "a", World(size=4)).load_state_dict(json.loads(json.dumps(state)))
    with pytest.raises(IntegrityError, match=r"changed since the checkpoint: 'train' has other shards"):
        stream(tmp_path / "b", World()).load_state_dict(state)
    with pytest.raises(IntegrityError, match="seed=7, this run 8"):
        stream(tmp_path / "a", World(), seed=8).load_state_dict(state)


def test_a_mixture_gives_each_source_its_share_and_its_own_order(tmp_path):
    counts = {"cats": 3000, "dogs": 500}
    for name, count in counts.items():
        content = encoded(picture(1))
        rows = [{"__key__": str(i), "png": content, "txt": f"{name} {i}".encode()} for i in range(count)]
        write_shard(tmp_path / name / "0.tar", rows)
    config = DataConfig(
        train={
            "cats": {"shards": str(tmp_path / "cats"), "weight": 0.75},
            "dogs": {"shards": str(tmp_path / "dogs"), "weight": 0.25},
        },
        workers=0,
    )
    training_stream = config.build_train(
        world=World(), seed=3, global_batch_size=512, tokenizer=ByteTokenizer(), image_size=16
    )
    seen = {name: [None] * 3072 for name in counts}
    rows = [
        (int(s), caption_of(t)) for b in _take(training_stream, 0, 8) for s, t in zip(b.slots, b.tokens, strict=True)
    ]
    for name, count in counts.items():
        seen = [int(caption.split()[1]) for _, caption in sorted(rows) if caption.startswith(name)]
        assert len(seen) == {"cats": 3072, "dogs": 1024}[name]
        order = SourceOrder([count], name=name, seed=3)
        assert seen == order.locate(np.arange(len(seen)))[1].tolist()
    sources = training_stream.state_dict(0)["segments"][0]["sources"]
    assert [(s["name"], s["quota"]) for s in sources] == [("cats", 3072), ("dogs", 1024)]


_KILLED = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.data.made import stream
from clip_train.distributed.world import World
if __name__ == "__main__":
    import multiprocessing
    s = stream(Path(sys.argv[1]), World(), workers=2)
    for _ in s.batches(0):
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        break
    sys.stdin.read()
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_when_the_trainer_is_killed(tmp_path):
    numbered_shards(tmp_path / "data", COUNTS)
    script = tmp_path / "trainer.py"
    script.write_text(_KILLED)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), str(tmp_path / "data"), str(root)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive the trainer"
        time.sleep(0.1)
