"""Check that the memory of trainer and workers does not grow while samples pass.

    python scripts/check_memory.py                      # 200,000 samples after the warm-up
    python scripts/check_memory.py --samples 20000      # to see that it runs

Generated shards of small JPEGs and PNGs, some of them damaged, go through the training stream with every augmentation.
Each process is measured at regular intervals after the warm-up: private memory, shared memory and open files. Growth is
the difference of the medians of the last and the first quarter of the measurements. Exits with 1 above the limit.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import bench
import torch

from clip_train.data.config import DataConfig
from clip_train.data.shards.writer import ShardSetWriter
from clip_train.distributed.world import World
from clip_train.tokenizer.bpe import ClipTokenizer

SAMPLES, SAMPLES_PER_SHARD = 3000, 250
BAD_EVERY = 500
MEASUREMENTS = 40
IMAGE_SIZE = 32


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="after the warm-up (default 200,000)")
    parser.add_argument("--warmup", type=int, default=20_000, help="samples before the first measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--limit-mb", type=float, default=2.0, help="growth of one process that is allowed (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        measured = run(options, Path(folder))
    rows = [growth(pid, values) for pid, values in measured.items()]
    bench.print_table(rows)
    worst = max(row["grown MB"] for row in rows)
    verdict = "within" if worst <= options.limit_mb else "above"
    print(f"\n{options.samples:,} samples: {worst:.2f} MB at most, {verdict} the limit of {options.limit_mb} MB")
    leaked = [row["process"] for row in rows if row["files at the end"] > row["files at first"]]
    if leaked:
        print(f"open files of {', '.join(map(str, leaked))} grew")
    return int(worst > options.limit_mb or bool(leaked))


def write_shards(folder: Path) -> None:
    """Write small pictures, every 500th of them damaged."""
    from photographs import photograph

    with ShardSetWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for i in range(SAMPLES):
            image_format, extension = ("PNG", "png") if i % 10 == 0 else ("JPEG", "jpg")
            buffer = io.BytesIO()
            photograph(48 + i % 32, 48 + i % 17, seed=i).save(buffer, image_format)
            content = buffer.getvalue()
            if i % BAD_EVERY == 1:
                content = content[: len(content) // 2]
            writer.write(f"{i:06d}", {extension: content, "txt": f"picture {i} of {SAMPLES}, a {i % 97} by {i % 89}"})


def run(options: argparse.Namespace, folder: Path) -> dict[int, list[tuple[float, int]]]:
    """Return memory in MB and open files of every process, at regular intervals."""
    config = DataConfig(
        train=str(folder), workers=options.workers, decode="fast", flip=True, color_jitter=[0.4, 0.4, 0.4, 0.1],
        randaugment=[2, 9], window=500, max_bad_fraction=1.0,
    )  # fmt: skip
    stream = config.build_train(
        world=World(), seed=0, global_batch_size=options.batch, tokenizer=ClipTokenizer(), image_size=IMAGE_SIZE
    )
    measured: dict[int, list[tuple[float, int]]] = defaultdict(list)
    every = max(1, options.samples // MEASUREMENTS // options.batch)
    first, last = options.warmup // options.batch, (options.warmup + options.samples) // options.batch
    for step, _ in enumerate(stream.batches(0)):
        if step >= first and (step - first) % every == 0:
            for pid in bench.family():
                measured[pid].append((resident_mb(pid), open_files(pid)))
        if step >= last:
            break
    stream.close()
    most = max(len(values) for values in measured.values())
    return {pid: values for pid, values in measured.items() if len(values) == most}


def resident_mb(pid: int) -> float:
    """Return the memory of a process that no file backs: private and shared."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    kib = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return (int(kib["RssAnon"]) + int(kib["RssShmem"])) / 1024


def open_files(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def growth(pid: int, values: list[tuple[float, int]]) -> dict[str, float]:
    """Compare the first and the last quarter of a process's measurements."""
    quarter = max(1, len(values) // 4)
    start, end = (statistics.median(v[0] for v in part) for part in (values[:quarter], values[-quarter:]))
    files = [v[1] for v in values]
    return {
        "process": pid,
        "MB at first": round(start, 2),
        "MB at the end": round(end, 2),
        "grown MB": round(end - start, 2),
        "files at first": max(files[:quarter]),
        "files at the end": min(files[-quarter:]),
    }


if __name__ == "__main__":
    sys.exit(main())
