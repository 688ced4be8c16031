"""Speed of the index pass on one core, against webdataset and Python's tarfile reading the same shards.

    python scripts/bench_index.py --json index.json

All sides find every sample of generated shards (picture, caption, metadata; file cache warm). Seconds are those of the
processor, so they also hold on a machine that has other work. Expected: 40,000 samples/s/core or more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import bench
import webdataset

from clip_train.data.index.walk import IndexOptions, index_shard
from clip_train.data.shards.filters import MetadataRule, parse_condition
from clip_train.data.shards.writer import ShardWriter

FILTERED = IndexOptions(rule=MetadataRule(conditions=(parse_condition("similarity>=0.3"),)))


def main() -> None:
    """Measure as the command line says."""
    options = parse()
    started = bench.environment(options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.bytes:
            shard = write_shard(Path(folder) / f"{size}.tar", samples=options.samples, size=size)
            sides: dict[str, Callable[[], object]] = {
                "index": lambda shard=shard: index_shard(shard, options=IndexOptions()),
                "with a filter": lambda shard=shard: index_shard(shard, options=FILTERED),
                "webdataset": lambda shard=shard: sum(1 for _ in webdataset.WebDataset(str(shard), shardshuffle=False)),
                "tarfile": lambda shard=shard: list_members(shard),
            }
            seconds = bench.interleaved(
                {name: lambda run=run: processor_seconds(run) for name, run in sides.items()}, rounds=options.rounds
            )
            rows += [
                {
                    "bytes": size,
                    "side": name,
                    "samples/s/core": round(options.samples / statistics.median(taken)),
                    "times webdataset": bench.shown_ratio(bench.ratio(seconds["webdataset"], taken)),
                }
                for name, taken in seconds.items()
            ]
    bench.print_table(rows)
    bench.finish(options, started=started, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.add_argument("--samples", type=int, default=10_000, help="samples of a shard (default 10,000)")
    parser.add_argument("--bytes", type=int, nargs="+", default=[20_000, 60_000], help="bytes of a picture")
    return parser.parse_args()


def write_shard(path: Path, *, samples: int, size: int) -> Path:
    """Write a shard whose members have the sizes of real ones; none is ever decoded."""
    picture = random.Random(0).randbytes(size)
    with ShardWriter(path) as writer:
        for number in range(samples):
            metadata = f'{{"caption": "{"x" * 60}", "url": "{"y" * 80}", "similarity": {number / samples}}}'
            writer.write(f"{number:09d}", {"jpg": picture, "txt": "x" * 60, "json": metadata})
    return path


def list_members(shard: Path) -> list[tarfile.TarInfo]:
    """Return the members of a tar as Python finds them."""
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def processor_seconds(run: Callable[[], object]) -> float:
    """Return the seconds of processor time that `run` takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the collector
        start = time.process_time()
        run()
        return time.process_time() - start


if __name__ == "__main__":
    main()
