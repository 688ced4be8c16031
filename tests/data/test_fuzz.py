"""Thousands of damaged shards and pictures: each gives its samples, a counted loss or a clear error, and soon."""

import concurrent.futures
import multiprocessing
import random
import resource
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_train.data.images.decode import BadSampleError, decode_image
from clip_train.data.index.tar import read_samples
from clip_train.data.index.walk import index_shards
from clip_train.data.reader import ShardReader
from clip_train.data.source import Source
from clip_train.errors import IntegrityError
from tests.data import fuzz

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
CHUNK = 500


def _samples(rng: random.Random) -> dict[str, dict[str, bytes]]:
    long = "folder/" * 20 if rng.random() < 0.3 else ""
    return {
        f"{long}{i:05d}": {"jpg": b"jpg %d " % i + rng.randbytes(rng.choice([0, 300, 2000])), "txt": b"caption %d" % i}
        for i in range(rng.choice([1, 3, 8]))
    }


def _damaged_tar(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:  # at the start of a header or content block, where it does most harm
        block = 512 * rng.randrange(len(content) // 512)
        kind = rng.randrange(4)
        if kind == 0:
            return content[:block] + fuzz.odd_member(rng) + content[block:]
        if kind == 1:
            return content[:block] + bytes(512 * rng.choice([1, 2])) + content[block:]
        if kind == 2:
            return content[:block] + content[block + 512 :]
        return content[:block]
    return fuzz.mutated(content, rng)


def _what_becomes_of(shard: Path, content: bytes) -> tuple[str, dict[bytes, bytes], int]:
    """Index and read a shard as a run does: an outcome, pictures by caption, and the count of incomplete samples."""
    shard.write_bytes(content)
    try:
        summary = index_shards([shard], jobs=1)
        reader = ShardReader(Source(name="train", root=shard.parent, shards=summary.shards))
        read = [reader.read(0, index) for index in range(summary.num_samples)]
        reader.close()
    except IntegrityError as error:
        assert shard.name in str(error), error
        return "refused", {}, 0
    return "read", {members[0]: image for image, members in read}, sum(summary.skipped.values())


def _samples_before(end: int, shard: Path, content: bytes) -> int:
    """Count the samples that begin before byte `end`. What zeros cover up to the end of a file looks like padding."""
    shard.write_bytes(content)
    return sum(min(m.offset for m in sample.members.values()) <= end for sample in read_samples(shard))


def fuzz_tar(folder: Path, seed: int) -> str:
    """Damage a shard and read it; "read" or "refused"."""
    rng = random.Random(seed)
    samples = _samples(rng)
    content = fuzz.tar_of(samples, tar_format=rng.choice(FORMATS), rng=rng)
    begun = time.monotonic()
    damaged = _damaged_tar(rng, content)
    outcome, found, incomplete = _what_becomes_of(folder / "a.tar", damaged)
    assert time.monotonic() - begun < 10, seed
    if outcome == "read":
        # What is missing was counted. Bytes inside a picture or a caption may have changed: crc32 tells those.
        visible = _samples_before(len(damaged.rstrip(b"\0")), folder / "good.tar", content)
        assert len(found) + incomplete >= visible, (seed, visible, len(found), incomplete)
    return outcome


def test_damaged_shards_are_refused_or_lose_nothing_silently(tmp_path):
    outcomes = Counter(fuzz_tar(tmp_path, seed) for seed in range(400))
    assert min(outcomes["refused"], outcomes["read"]) > 40


@pytest.mark.slow
def test_ten_thousand_damaged_shards_are_refused_or_lose_nothing_silently(tmp_path):
    outcomes = Counter(fuzz_tar(tmp_path, seed) for seed in range(10_000))
    assert min(outcomes["refused"], outcomes["read"]) > 1000


def _decode_damaged(seeds: range) -> tuple[Counter, float, float]:
    """Decode damaged pictures; how each ended, the longest time in seconds, and the growth of memory in MB."""
    names = list(fuzz.pictures().items())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter = Counter()
    longest = 0.0
    for seed in seeds:
        rng = random.Random(seed)
        content = names[seed % len(names)][1]
        for _ in range(rng.choice([1, 1, 3])):
            content = fuzz.mutated(content or b"x", rng)
        begun = time.monotonic()
        try:
            pixels = decode_image(content)
        except BadSampleError as error:
            outcomes[error.reason] += 1
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.flags.writeable
            outcomes["decoded"] += 1
        longest = max(longest, time.monotonic() - begun)
    return outcomes, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def fuzz_pictures(start: int, count: int) -> Iterator[tuple[range, Counter]]:
    """Decode in a process of its own, since a decoder that crashes takes its process with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clip_train.data.dataset"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for first in range(start, start + count, CHUNK):
            seeds = range(first, min(first + CHUNK, start + count))
            outcomes, longest, grown = pool.submit(_decode_damaged, seeds).result(timeout=120)
            assert longest < 10 and grown < 300, (seeds, longest, grown)
            assert outcomes.total() == len(seeds)
            yield seeds, outcomes


def test_damaged_pictures_are_decoded_or_refused_with_a_reason():
    outcomes: Counter = sum((found for _, found in fuzz_pictures(0, 600)), Counter())
    assert outcomes["undecodable"] > 50 and outcomes["unknown_format"] > 20 and outcomes["decoded"] > 50


@pytest.mark.slow
def test_twenty_thousand_damaged_pictures_in_twelve_formats_are_decoded_or_refused_with_a_reason():
    assert len(fuzz.pictures()) >= 12
    assert sum(len(seeds) for seeds, _ in fuzz_pictures(0, 20_000)) == 20_000
