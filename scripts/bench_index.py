"""Speed of the index pass, and of a cold start in the middle of a run over a very large index.

    python scripts/bench_index.py --json index.json
    python scripts/bench_index.py --samples 2000 --shards 2000 --rounds 1     # seconds, to see that it runs

`walk` indexes a generated shard in one process by its headers, `walk, crc` also reads and hashes every byte, and
`webdataset` reads the same tar through webdataset's own tar reader and grouping. Rates are per second of CPU time.
`cold start` builds the stream over a synthetic index (200,000 shards of 10,000 samples), takes the state of a
checkpoint in the middle of its first epoch, and names the samples of the first batch: all that a resume does before it
reads. No picture is opened; there are none.

Aims: at least 40,000 samples a second and core by headers; a cold start in at most 1 second at 2 G samples.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np

from clip_train.data.config import DataConfig
from clip_train.data.index import ShardEntry
from clip_train.data.indexing import index_shards
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.data.source import Source
from clip_train.distributed.world import World

SAMPLES_PER_SHARD = 10_000
IMAGE_BYTES = (20_000, 40_000)
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
    parser.add_argument("--samples", type=int, default=20_000, help="samples of the generated shard (default 20,000)")
    parser.add_argument("--shards", type=int, default=200_000, help="shards of the synthetic index (default 200,000)")
    options = parser.parse_args()
    started = bench.environment(options)
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder), samples=options.samples)
        sides = {
            "walk": lambda: cpu_seconds(lambda: index_shards([shard], jobs=1)),
            "walk, crc": lambda: cpu_seconds(lambda: index_shards([shard], crc=True, jobs=1)),
            "webdataset": lambda: cpu_seconds(lambda: read_with_webdataset(shard, samples=options.samples)),
        }
        sides["walk"]()  # the page cache, and the imports of the first call
        seconds = bench.interleaved(sides, rounds=options.rounds)
    rows = [rate(name, seconds, samples=options.samples) for name in sides]
    cold = [cold_start(options.shards) for _ in range(max(3, options.rounds))]
    rows.append(
        {"what": "cold start", "samples": options.shards * SAMPLES_PER_SHARD, "seconds": cold, "per_core_second": None,
         "ratio": None}
    )  # fmt: skip
    bench.print_table([shown(row) for row in rows])
    bench.finish(options, started=started, rows=rows)


def write_shard(folder: Path, *, samples: int) -> Path:
    """Write a shard whose members have the sizes of small photographs; their content does not matter here."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(IMAGE_BYTES[1])
    with ShardSetWriter(folder / "shards", samples_per_shard=samples) as writer:
        for number, size in enumerate(rng.integers(*IMAGE_BYTES, samples).tolist()):
            writer.write(f"{number:08d}", {"jpg": noise[:size], "txt": f"caption number {number}"})
    return writer.shards[0]


def read_with_webdataset(shard: Path, *, samples: int) -> None:
    """Group the members of a tar as webdataset's pipelines do."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with shard.open("rb") as stream:
        found = sum(1 for _ in group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert found == samples


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


def cpu_seconds(run: Any) -> float:
    """Return the processor time of this process that `run` takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def rate(name: str, seconds: dict[str, list[float]], *, samples: int) -> dict[str, Any]:
    """Return a row: samples per second of CPU time, and how many times webdataset's."""
    return {
        "what": name,
        "samples": samples,
        "seconds": seconds[name],
        "per_core_second": samples / statistics.median(seconds[name]),
        "ratio": bench.ratio(seconds["webdataset"], seconds[name]),
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for people."""
    rate_of = row["per_core_second"]
    return {
        "what": row["what"],
        "samples": f"{row['samples']:,}",
        "seconds": statistics.median(row["seconds"]),
        "samples/s/core": "-" if rate_of is None else f"{rate_of:,.0f}",
        "x webdataset": bench.shown_ratio(row["ratio"]),
    }


if __name__ == "__main__":
    main()
