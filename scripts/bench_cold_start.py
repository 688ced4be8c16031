"""Seconds of a cold start in the middle of a run over a very large index.

    python scripts/bench_cold_start.py --json cold.json
    python scripts/bench_cold_start.py --shards 2000 --rounds 1     # to see that it runs

Builds the stream over a synthetic index (200,000 shards of 10,000 samples), takes the state of a checkpoint in the
middle of its first epoch, and names the samples of the first batch: all that a resume does before it reads. No picture
is opened; there are none. Aim: at most 1 second at 2 G samples.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np

from clip_train.data.config import DataConfig
from clip_train.data.index.files import ShardEntry
from clip_train.data.source import Source
from clip_train.distributed.world import World

SAMPLES_PER_SHARD = 10_000
GLOBAL_BATCH_SIZE = 4096


class NoTokenizer:
    """Stands for a tokenizer where no caption is read."""

    context_length = 77

    def encode_padded(self, text: str) -> tuple[np.ndarray, int, bool]:
        """Raise: nothing here reads captions."""
        raise AssertionError(text)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--shards", type=int, default=200_000, help="shards of the synthetic index (default 200,000)")
    options = parser.parse_args()
    started = bench.environment(options)
    seconds = [cold_start(options.shards) for _ in range(options.rounds)]
    samples = options.shards * SAMPLES_PER_SHARD
    row = {"samples": samples, "seconds": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}
    bench.print_table([row])
    bench.finish(options, started=started, rows=[row])


def cold_start(shards: int) -> float:
    """Return the seconds from an opened index to the samples of the first batch of a resumed run."""
    entries = tuple(
        ShardEntry(path=Path(f"/absent/{i:06d}.tar"), n=SAMPLES_PER_SHARD, bytes=400_000_000, idx_sha256="0" * 64)
        for i in range(shards)
    )
    source = Source(name="train", root="/absent", shards=entries)
    consumed = shards * SAMPLES_PER_SHARD // 2 // GLOBAL_BATCH_SIZE * GLOBAL_BATCH_SIZE
    state = new_stream(source).state_dict(consumed)
    start = time.perf_counter()
    stream = new_stream(source)
    stream.load_state_dict(state)
    slots = stream.order.global_batch(consumed, global_batch_size=GLOBAL_BATCH_SIZE)
    located = stream.order.locate(slots)
    seconds = time.perf_counter() - start
    assert len(np.unique(np.stack(located), axis=1).T) == GLOBAL_BATCH_SIZE
    return seconds


def new_stream(source: Source) -> Any:
    """Return a stream over a source, as a run builds it."""
    config = DataConfig(train="/absent", workers=0)
    return config.stream(
        [source], world=World(), seed=0, global_batch_size=GLOBAL_BATCH_SIZE, tokenizer=NoTokenizer(), image_size=224
    )


if __name__ == "__main__":
    main()
