"""Make shards from a folder of pictures with a caption file each."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from clip_train.data.captions import decode_caption
from clip_train.data.decode import BadSampleError, decode_image, open_image
from clip_train.data.index import IMAGE_EXTENSIONS
from clip_train.data.shards.writer import SAMPLES_PER_SHARD, ShardSetWriter
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_EXTENSION_BY_FORMAT = {"JPEG": "jpg", "TIFF": "tif"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeSummary:
    """What `make_shards` wrote and what it left out."""

    train: int  # samples
    val: int
    shards: int
    skipped: dict[str, int]  # pictures by reason

    def __str__(self) -> str:
        left_out = "".join(f"\n{count:,} left out: {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{self.train:,} pairs for training and {self.val:,} held out, in {self.shards:,} shards{left_out}"


class _Sample(NamedTuple):
    name: str  # for the key
    in_val: bool
    parts: dict[str, bytes]


def make_shards(
    source: Path, out: Path, *, samples_per_shard: int = SAMPLES_PER_SHARD, val: float = 0.0, resize: int | None = None,
    quality: int = 90, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> MakeSummary:  # fmt: skip
    """Write every picture below `source` that has a caption into shards below `out/train` and `out/val`.

    A picture `x.jpg` needs `x.txt`; `x.cls` is copied where it exists. Pictures are shuffled, since folders are sorted
    by class. Validation is chosen by the hash of the picture's bytes, so that copies stay on one side.

    Args:
        source: folder of pictures, searched in depth.
        out: folder for the shards.
        samples_per_shard: samples of all shards but the last.
        val: share of pictures held out; 0 writes no `out/val`.
        resize: shorten the short side to this many pixels where it is longer; None stores the files as they are.
        quality: JPEG quality of resized photographs; other formats become PNG.
        seed: of the shuffle.
        progress: called with the number of pictures done and of all, after each.

    Raises:
        UserError: `source` holds no pictures with captions, `out` already holds shards, or a value is out of range.
    """
    if not 0 <= val < 1:
        raise UserError(f"val={val} must lie in [0, 1)")
    if resize is not None and resize < 1:
        raise UserError(f"resize={resize} must be positive")
    pictures = _find_pictures(source, seed=seed)
    skipped: Counter[str] = Counter()
    with ExitStack() as stack:
        names = ("train", "val") if val else ("train",)
        writers = {
            name: stack.enter_context(ShardSetWriter(out / name, samples_per_shard=samples_per_shard)) for name in names
        }
        for number, picture in enumerate(pictures):
            try:
                sample = _read_sample(picture, val=val, resize=resize, quality=quality)
                writers["val" if sample.in_val else "train"].write(f"{number:08d}-{sample.name}", sample.parts)
            except BadSampleError as error:
                skipped[error.reason] += 1
            if progress is not None:
                progress(number + 1, len(pictures))
    if not any(writer.num_samples for writer in writers.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(f"{source}: none of {len(pictures)} pictures can be used: {reasons}")
    return MakeSummary(
        train=writers["train"].num_samples,
        val=writers["val"].num_samples if val else 0,
        shards=sum(len(writer.shards) for writer in writers.values()),
        skipped=dict(sorted(skipped.items())),
    )


def _find_pictures(source: Path, *, seed: int) -> list[Path]:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder of pictures")
    found = [path for path in source.rglob("*") if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    if not found:
        raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")

    def shuffled(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}/{path.relative_to(source).as_posix()}".encode(errors="surrogateescape")).digest()

    return sorted(found, key=shuffled)


def _read_sample(picture: Path, *, val: float, resize: int | None, quality: int) -> _Sample:
    """Read, check and if asked shrink one picture.

    Raises:
        BadSampleError: it has no usable caption or cannot be decoded.
    """
    caption = _read_optional(picture.with_suffix(".txt"))
    if caption is None:
        raise BadSampleError("caption_missing")
    decode_caption(caption)
    content = _read_optional(picture) or b""
    # The header alone tells the format, and refuses huge pictures before a pixel is decoded.
    image_format = open_image(content).format or ""
    extension = _EXTENSION_BY_FORMAT.get(image_format, image_format.lower())
    share = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    pixels = decode_image(content)
    if resize is not None and min(pixels.shape[:2]) > resize:
        extension = "jpg" if extension == "jpg" else "png"
        content = _shrink(Image.fromarray(pixels), short_side=resize, extension=extension, quality=quality)
    parts = {extension: content, "txt": caption}
    label = _read_optional(picture.with_suffix(".cls"))
    if label is not None:
        parts["cls"] = label
    return _Sample(re.sub(r"[^A-Za-z0-9_-]+", "_", picture.stem)[:60], share < val, parts)


def _read_optional(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSampleError("unreadable") from error


def _shrink(image: Image.Image, *, short_side: int, extension: str, quality: int) -> bytes:
    factor = short_side / min(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    buffer = io.BytesIO()
    resized = image.resize(size, Image.Resampling.BICUBIC)
    if extension == "jpg":
        resized.save(buffer, "JPEG", quality=quality)
    else:
        resized.save(buffer, "PNG")
    return buffer.getvalue()
