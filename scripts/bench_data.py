"""Speed of the whole data pipeline, from tar files to batches in the trainer, against open_clip 3.3.0's own.

    python scripts/bench_data.py --peer-python PATH --json data.json
    python scripts/bench_data.py --sizes 512 --images 128 --rounds 1     # a minute, to see that it runs

Both sides read the same shards of square JPEGs at quality 90, generated ones with the statistics of photographs (which
are twice as heavy as real ones) or those of `--pictures`, and deliver random crops of 224 pixels with tokens. A side is
a trainer process with one loader process and one thread, both tied to one core: images per second are images per
second and core. Sides: `exact`, `fast` at floors 1 and 2, and open_clip's `get_wds_dataset` with its training
transforms, as it comes except for a shuffle buffer of 500 samples. Images per second of CPU time (core-s) also hold on
a machine that has other work.

To give open_clip the allocator settings that our workers choose for themselves, run with
`MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647` in the environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench

IMAGE_SIZE = 224
SIDES = {
    "exact": {"decode": "exact"},
    "fast, floor 2": {"decode": "fast", "decode_floor": 2.0},
    "fast, floor 1": {"decode": "fast", "decode_floor": 1.0},
}
PEER = "open_clip"
SHARDS, SAMPLES_PER_SHARD = 4, 500
SHUFFLE_BUFFER = 500
QUIET_SECONDS = 0.3


def main() -> None:
    """Measure as the command line says."""
    if "--worker" in sys.argv:
        bench.serve(build)
        return
    options = parse()
    started = bench.environment(options)
    with_peer = has_peer(options.peer_python)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            shards = write_shards(Path(folder) / str(size), files=jpegs(options, size=size))
            measured = measure(options, shards, size=size, with_peer=with_peer)
            bench.print_table([shown(row) for row in measured])
            rows += measured
    bench.finish(options, started=started, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.common_flags(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024], help="sides of the pictures, pixels")
    parser.add_argument("--images", type=int, default=1024, help="per side and round (default 1024)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch (default 64)")
    parser.add_argument("--photos", type=int, default=40, help="different pictures of each size (default 40)")
    parser.add_argument("--pictures", type=Path, help="folder of real pictures to use instead of generated ones")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core of all sides (default: last)")
    return parser.parse_args()


def has_peer(python: str) -> bool:
    """Return whether open_clip's pipeline runs in the interpreter `python`."""
    code = "import importlib.metadata as m; m.version('open_clip_torch'); print(m.version('webdataset'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    if found and int(found.partition(".")[0]) > 0:
        print(f"{python} has webdataset {found}, on which open_clip 3.3.0's pipeline fails: ours alone is measured")
        return False
    return bool(found)


def jpegs(options: argparse.Namespace, *, size: int) -> list[bytes]:
    """Return square JPEGs of `size`: generated, or what a resize to a square makes of pictures at least that large."""
    import io

    from photographs import photograph
    from PIL import Image, ImageOps

    if options.pictures is None:
        pictures = [photograph(size, size, seed=seed) for seed in range(options.photos)]
    else:
        opened = [Image.open(path).convert("RGB") for path in sorted(options.pictures.iterdir())]
        square = (size, size)
        pictures = [ImageOps.fit(p, square, Image.Resampling.LANCZOS) for p in opened if min(p.size) >= size]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    print(f"{size} px: {len(files)} pictures of {sum(map(len, files)) / len(files) / 1000:.0f} KB")
    return files


def write_shards(folder: Path, *, files: list[bytes]) -> Path:
    """Write shards of these JPEGs; every picture occurs many times, every time with another caption."""
    from bench_inputs import captions

    from clip_train.data.shards.writer import ShardSetWriter

    texts = captions(SHARDS * SAMPLES_PER_SHARD, seed=0)
    with ShardSetWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for i, text in enumerate(texts):
            writer.write(f"{i:06d}", {"jpg": files[i % len(files)], "txt": text})
    return folder


def measure(options: argparse.Namespace, shards: Path, *, size: int, with_peer: bool) -> list[dict[str, Any]]:
    """Measure all sides on one folder of shards in turning order; one row per side."""
    settings = {"shards": str(shards), "batch": options.batch, "device": "cpu", "threads": options.threads}
    settings["core"] = options.core
    names = [*SIDES, PEER] if with_peer else list(SIDES)
    replies: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                bench.Worker(
                    __file__,
                    python=options.peer_python if name == PEER else sys.executable,
                    settings=settings | {"side": name},
                )
            )
            for name in names
        }
        for i in range(options.rounds):
            for name in names[:: -1 if i % 2 else 1]:
                replies[name].append(sides[name].ask({"images": options.images}))
    quality = {name: decibels(shards, data=SIDES[name]) for name in SIDES}
    return [summary(name, replies, size=size, quality=quality.get(name)) for name in names]


def summary(name: str, replies: dict[str, list[dict[str, float]]], *, size: int, quality: Any) -> dict[str, Any]:
    """Return the medians of a side's rounds and its ratios to open_clip."""
    row: dict[str, Any] = {"size": size, "side": name}
    for unit in ("seconds", "core_seconds"):
        row[f"images_per_{unit[:-1]}"] = statistics.median(reply["images"] / reply[unit] for reply in replies[name])
        ratio = None
        if PEER in replies:
            theirs, ours = ([r[unit] / r["images"] for r in replies[side]] for side in (PEER, name))
            ratio = bench.ratio(theirs, ours)
        row[f"ratio_{unit}"] = ratio
    row["bytes_per_image"] = replies[name][0]["bytes"] / replies[name][0]["images"]
    row["psnr_mean"], row["psnr_min"] = quality or (None, None)
    return row


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it is printed."""
    quality = "reference" if row["psnr_mean"] is None else f"{row['psnr_mean']:.1f} / {row['psnr_min']:.1f}"
    return {
        "pixels": row["size"],
        "side": row["side"],
        "images/s": f"{row['images_per_second']:.0f}",
        "ratio": bench.shown_ratio(row["ratio_seconds"]),
        "images/core-s": f"{row['images_per_core_second']:.0f}",
        "ratio of these": bench.shown_ratio(row["ratio_core_seconds"]),
        "KB/image": f"{row['bytes_per_image'] / 1000:.0f}",
        "PSNR mean / lowest": quality,
    }


def decibels(shards: Path, *, data: dict[str, Any]) -> tuple[float, float]:
    """Return mean and lowest PSNR of training rows against Pillow on the same crop, over the shards' pictures."""
    import numpy as np
    from photographs import pillow_row, psnr

    from clip_train.data.config import DataConfig
    from clip_train.data.images.transforms import sample_uniforms
    from clip_train.data.index.tar import read_samples

    config = DataConfig(**data)
    transform = config.transform(image_size=IMAGE_SIZE)
    tar = sorted(shards.glob("*.tar"))[0]
    content, found = tar.read_bytes(), []
    for slot, sample in enumerate(read_samples(tar)):
        if slot == 40:
            break
        member = sample.members["jpg"]
        jpeg = content[member.offset : member.offset + member.size]
        row = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        uniforms = sample_uniforms(0, slot)
        transform(jpeg, uniforms=uniforms, out=row)
        found.append(psnr(row, pillow_row(jpeg, transform=transform, uniforms=uniforms)))
    return statistics.mean(found), min(found)


def build(settings: dict[str, Any]) -> Any:
    """Start one side's pipeline in this process and return what times it."""
    os.sched_setaffinity(0, {settings["core"]})
    batches = peer_batches(settings) if settings["side"] == PEER else our_batches(settings)
    for _ in range(3):
        next(batches)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        for _ in range(4):  # what the loader had prefetched while the other sides were measured
            next(batches)
        images = num_bytes = 0
        core, start = core_seconds(), time.perf_counter()
        while images < request["images"]:
            tensors = list(next(batches))
            images += len(tensors[0])
            num_bytes += sum(tensor.nbytes for tensor in tensors)
        reply = {"seconds": time.perf_counter() - start, "core_seconds": core_seconds() - core}
        wait_until_idle()
        return reply | {"images": images, "bytes": num_bytes}

    return answer


def our_batches(settings: dict[str, Any]) -> Iterator[Any]:
    """Return the batches of a training stream with one worker."""
    from clip_train.data.config import DataConfig
    from clip_train.distributed.world import World
    from clip_train.tokenizer.bpe import ClipTokenizer

    config = DataConfig(train=settings["shards"], workers=1, **SIDES[settings["side"]])
    stream = config.build_train(
        world=World(), seed=0, global_batch_size=settings["batch"], tokenizer=ClipTokenizer(), image_size=IMAGE_SIZE
    )
    return iter(stream.batches(0))


def peer_batches(settings: dict[str, Any]) -> Iterator[Any]:
    """Return the batches of open_clip's training loader with one worker."""
    import open_clip

    sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # imported for its CSV reader only
    from open_clip_train import data

    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = SHUFFLE_BUFFER
    args = types.SimpleNamespace(
        train_data=f"{settings['shards']}/{{000000..{SHARDS - 1:06d}}}.tar", train_num_samples=10**9,
        train_data_upsampling_factors=None, dataset_resampled=True, batch_size=settings["batch"], workers=1,
        world_size=1, seed=0,
    )  # fmt: skip
    transform = open_clip.transform.image_transform(IMAGE_SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return iter(data.get_wds_dataset(args, transform, True, tokenizer=tokenizer).dataloader)


def core_seconds() -> float:
    """Return the CPU time of this process and of all that it started, directly or not."""
    ticks = 0
    for pid in bench.family():
        fields = bench.process_fields(pid)
        ticks += int(fields[11]) + int(fields[12]) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_idle() -> None:
    """Wait until the loader has prefetched what it may, so that it does not disturb the next side."""
    before = -1.0
    while before != (now := core_seconds()):
        before = now
        time.sleep(QUIET_SECONDS)


if __name__ == "__main__":
    main()
