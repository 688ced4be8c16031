"""Small shards with known content, written with webdataset, and a stand-in tokenizer."""

import io
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from clip_train.data.config import DataConfig
from clip_train.data.delivery import StepExchange
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World


class ByteTokenizer:
    """Bytes plus a start and an end id: enough to recognise a caption."""

    context_length = 24

    def encode_padded(self, text: str):
        ids = np.zeros(self.context_length, dtype=np.int64)
        body = text.encode()[: self.context_length - 2]
        ids[: len(body) + 2] = [256, *body, 257]
        return ids, len(body) + 2, len(text.encode()) > len(body)


def caption_of(tokens: torch.Tensor) -> str:
    ids = [i for i in tokens.tolist() if i not in (256, 257)]
    return bytes(ids).rstrip(b"\0").decode()


def picture(value: int, *, size: tuple[int, int] = (20, 18)) -> Image.Image:
    """A noise picture that differs for every value."""
    pixels = np.random.default_rng(value).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        for sample in samples:
            writer.write(sample)
        writer.close()
    return path


def numbered_shards(folder: Path, counts: list[int], *, bad: set[int] = frozenset()) -> Path:
    """Write shards whose captions count from 0 in shard order; pictures of the numbers in `bad` are damaged."""
    number = 0
    for shard, count in enumerate(counts):
        samples = []
        for index in range(count):
            content = b"not a picture" if number in bad else encoded(picture(number))
            samples.append({"__key__": f"{index:04d}", "png": content, "txt": f"n {number}".encode()})
            number += 1
        write_shard(folder / f"s-{shard:03d}.tar", samples)
    return folder


def stream(folder: Path | str, world, *, batch: int = 8, seed: int = 7, image_size: int = 16, **options):
    """A stream over a folder or a pattern. Ranks need no process group: rank 0 alone opens the shards."""
    config = DataConfig(train=str(folder), **({"workers": 0, "lanes": 4, "window": 6} | options))
    return config.stream(
        config.open_train(world=World()), world=world, seed=seed, global_batch_size=batch, tokenizer=ByteTokenizer(),
        image_size=image_size,
    )  # fmt: skip


def steps(training_stream, world, run_dir: Path, *, batch: int = 8, done: int = 0, count: int) -> list:
    """Fetch the batches of `count` steps as the trainer does, after `done` steps, with account kept in `run_dir`."""
    run_dir.mkdir(exist_ok=True)
    batches = training_stream.batches(done * batch)
    exchange = StepExchange(
        training_stream, batches=batches, run_dir=run_dir, world=world, step=done, consumed=done * batch
    )
    try:
        assert exchange.newest is None
        found = [exchange.next(step=done + i + 1, stop=StopReason.none).batch for i in range(count)]
        assert exchange.newest == (done + count, (done + count - 1) * batch)
        return found
    finally:
        exchange.close()
        training_stream.close()
