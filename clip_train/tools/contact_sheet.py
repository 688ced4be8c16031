"""Show samples on one page: each picture as stored and as the trainer sees it, with its caption read back from ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.data.captions import CaptionChooser
from clip_train.data.config import DataConfig
from clip_train.data.images.decode import BadSampleError, open_image, to_rgb
from clip_train.data.images.transforms import CAPTION_WORD, TrainTransform, sample_uniforms
from clip_train.data.order import SlotOrder, SourceOrder
from clip_train.data.reader import ShardReader
from clip_train.data.remote.config import CacheConfig
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.tokenizer.bpe import ClipTokenizer
from clip_train.tools.pages import page_templates, write_page
from clip_train.tools.report_pictures import data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN_SIDE = 320  # pixels of the stored picture's longer side on the page
_SHOWN_CAPTION = 600  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """One sample of a contact sheet."""

    slot: int
    key: str  # of the sample, with its shard
    facts: str  # format, mode and size of the stored picture
    stored: str | None  # address of the embedded picture
    trained: str | None
    caption: str
    read_back: str  # the caption from its ids
    num_tokens: int
    cut: bool
    problem: str | None  # why the sample cannot be used


def write_contact_sheet(
    patterns: str | Sequence[str], out: Path, *, number: int = 24, seed: int = 0, image_size: int = 224,
    caption: str = "txt", index_dir: Path | None = None, cache_dir: Path | None = None,
) -> Path:  # fmt: skip
    """Write a page with the first samples of the training order, and return its path.

    Args:
        patterns: shards, as for `data.train`; they are indexed if they are not.
        out: the page.
        number: samples shown.
        seed: of the order and the crops, as of a run.
        image_size: side of the pictures that the model takes, in pixels.
        caption: as `data.caption`.
        index_dir: as `data.index_dir`.
        cache_dir: as `data.cache.dir`; None takes its default.

    Raises:
        UserError: shards are missing, or a number is out of range.
        IntegrityError: a shard or an index is damaged.
    """
    for name, value, least in (("num", number, 1), ("image-size", image_size, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    config = DataConfig(
        train=patterns, caption=caption, index_dir=None if index_dir is None else str(index_dir),
        cache=CacheConfig() if cache_dir is None else CacheConfig(dir=str(cache_dir)),
    )  # fmt: skip
    (source,) = config.open_train(world=World())
    order = SlotOrder(
        [SourceOrder(source.counts, name=source.name, seed=seed, lanes=config.lanes, window=config.window)], seed=seed
    )
    slots = np.arange(min(number, source.num_samples))
    _, shards, indices = order.locate(slots)
    reader = ShardReader(source)
    chooser = CaptionChooser(config.caption_fields())
    low, high = config.crop_scale
    transform = TrainTransform(image_size=image_size, crop_scale=(low, high))
    samples = []
    for slot, shard, index in zip(slots.tolist(), shards.tolist(), indices.tolist(), strict=True):
        image, members = reader.read(shard, index)
        shown = _show(
            image, members, slot=slot, key=reader.key(shard, index), uniforms=sample_uniforms(seed, slot),
            chooser=chooser, transform=transform,
        )  # fmt: skip
        samples.append(shown)
    reader.close()
    page = page_templates().get_template("contact_sheet.html.j2").render(
        name=str(patterns), num_samples=source.num_samples, num_shards=len(source.shards), seed=seed,
        image_size=image_size, samples=samples, unusable=sum(sample.problem is not None for sample in samples),
    )  # fmt: skip
    return write_page(out, page)


def _show(
    image: bytes, members: Sequence[bytes], *, slot: int, key: str, uniforms: Sequence[float],
    chooser: CaptionChooser, transform: TrainTransform,
) -> ShownSample:  # fmt: skip
    facts, stored, trained, problem = f"{len(image):,} bytes", None, None, None
    try:
        facts, stored = _stored(image)
        pixels = np.zeros((transform.image_size, transform.image_size, 3), dtype=np.uint8)
        transform(image, uniforms=uniforms, out=pixels)
        trained = data_uri(pixels)
    except BadSampleError as error:
        problem = error.reason
    caption, ids, length, cut = "", np.empty(0, dtype=np.int64), 0, False
    tokenizer = ClipTokenizer()
    try:
        caption = chooser(members, uniform=uniforms[CAPTION_WORD])
        ids, length, cut = tokenizer.encode_padded(caption)
    except BadSampleError as error:
        problem = problem or error.reason
    return ShownSample(
        slot=slot,
        key=key,
        facts=facts,
        stored=stored,
        trained=trained,
        caption=caption if len(caption) <= _SHOWN_CAPTION else f"{caption[:_SHOWN_CAPTION]} …",
        read_back=tokenizer.decode(ids.tolist()),
        num_tokens=length,
        cut=cut,
        problem=problem,
    )


def _stored(content: bytes) -> tuple[str, str]:
    """Return what a stored picture is and the address of a small copy, not turned upright.

    Raises:
        BadSampleError: it cannot be read.
    """
    image = open_image(content)
    facts = f"{image.format} {image.mode} {image.width} × {image.height}, {len(content):,} bytes"
    try:
        rgb = to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise BadSampleError("undecodable") from error
    rgb.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return facts, data_uri(np.asarray(rgb))
