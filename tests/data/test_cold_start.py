"""A resume in the middle of a very large run reads nothing but its first batch."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from clip_train.data.config import DataConfig
from clip_train.data.index.files import ShardEntry
from clip_train.data.index.walk import index_shards
from clip_train.data.order import SlotOrder, SourceOrder
from clip_train.data.source import Source
from clip_train.distributed.world import World
from tests.data.made import ByteTokenizer, caption_of, numbered_shards

SHARDS, SAMPLES = 200_000, 10_000


def _stand_in(folder: Path, shard: int) -> ShardEntry:
    """A shard whose 10,000 records all point at its only sample."""
    numbered_shards(folder / f"{shard}", [1])
    tar = folder / f"{shard}" / "s-000.tar"
    index_shards([tar])
    records = tar.with_suffix(".idx").read_bytes() * SAMPLES
    tar.with_suffix(".idx").write_bytes(records)
    return ShardEntry(path=tar, n=SAMPLES, bytes=tar.stat().st_size, idx_sha256=hashlib.sha256(records).hexdigest())


@pytest.mark.slow
def test_a_resume_at_two_thousand_million_samples_opens_only_the_shards_of_its_first_batch(tmp_path):
    entries = [
        ShardEntry(path=Path(f"/absent/{i:06d}.tar"), n=SAMPLES, bytes=400_000_000, idx_sha256="")
        for i in range(SHARDS)
    ]
    consumed = 1_234_567_888
    order = SlotOrder([SourceOrder([SAMPLES] * SHARDS, name="train", seed=7)], seed=7)
    slots = np.arange(consumed, consumed + 8)
    for shard in set(order.locate(slots)[1].tolist()):
        entries[shard] = _stand_in(tmp_path, shard)
    source = Source(name="train", root="", shards=tuple(entries))
    config = DataConfig(train="absent", workers=0)

    def stream():
        return config.stream(
            [source], world=World(), seed=7, global_batch_size=8, tokenizer=ByteTokenizer(), image_size=16
        )

    state = stream().state_dict(consumed)
    start = time.process_time()
    resumed = stream()
    resumed.load_state_dict(state)
    batch = next(resumed.batches(consumed))
    seconds = time.process_time() - start
    resumed.close()
    assert sorted(batch.slots.tolist()) == slots.tolist() and batch.valid.all()
    assert {caption_of(tokens) for tokens in batch.tokens} == {"n 0"}
    assert seconds < 2  # 1 on a machine without other work; scripts/bench_cold_start.py measures it
