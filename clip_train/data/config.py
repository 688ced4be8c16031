"""Choices of `data.*`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.data.caption_fields import CaptionField, parse_caption_fields
from clip_train.data.remote.config import CacheConfig
from clip_train.data.source_patterns import TRAIN_SOURCE, is_patterns, patterns_by_source
from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.data.dataset import RowFiller, Tokenizer
    from clip_train.data.images.transforms import TrainTransform
    from clip_train.data.loader import TrainStream
    from clip_train.data.source import Source
    from clip_train.data.stream import BatchStream
    from clip_train.distributed.world import World


class Decode(StrEnum):
    exact = "exact"
    fast = "fast"


class OnBad(StrEnum):
    substitute = "substitute"
    mask = "mask"


class Reader(StrEnum):
    indexed = "indexed"
    streaming = "streaming"


class OnChange(StrEnum):
    stop = "stop"
    new_segment = "new_segment"


class EpochEnd(StrEnum):
    roll = "roll"
    drop_last = "drop_last"


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Which shards are read, and how their samples become batches."""

    train: Any = None
    """Training shards: a pattern such as `shards/train-{000..009}.tar`, a folder, a list of these, or a mixture
    `{name: {shards: PATTERN, weight: SHARE}}`; without weights a mixture is proportional to the sizes."""
    val: Any = None
    """Held-out shards, a pattern, a folder or a list. null: none."""
    reader: Reader = Reader.indexed
    """`indexed` counts the samples of every shard first: exact order, exact resume. `streaming` reads what cannot be
    indexed, such as `pipe:` commands, in an order that depends on ranks and workers; a resume begins at a shard."""
    num_samples: int | None = None
    """Samples of an epoch, which `streaming` cannot know. null with `indexed`, which counts them."""
    allow_pipe: bool = False
    """Run the shell commands that `pipe:` shards name. Only from the command line, never from a recipe."""
    public_only: bool = False
    """Refuse shards at addresses that are not public: this machine's, its network's, a cloud's metadata; also after a
    redirect, and with no proxy between. For lists of shards that others have written."""
    caption: Any = "txt"
    """Where captions are: `txt`, a field of the json member such as `json:caption` or `json:meta.alt` (a list there
    holds several captions, of which each use draws one), or a list of these, of which each use draws one."""
    caption_weights: list[float] | None = None
    """Share of the samples that take their caption from each field of a list. null: the same for all."""
    caption_template: str = "{}"
    """Text around every caption, such as `a photo of {}`. `{}` alone changes nothing."""
    index_dir: str | None = None
    """Folder for the index of shards whose own folder cannot be written. null: beside the shards."""
    workers: int = 2
    """Loader processes per rank. 0 loads in the trainer's process."""
    decode: Decode = Decode.exact
    """`exact` decodes every pixel. `fast` decodes large JPEGs at 1/2, 1/4 or 1/8, which blurs them a little."""
    decode_floor: float = 1.0
    """With `fast`, pixels that a crop keeps at least, as a multiple of the model's picture on each side. Photographs of
    1,024 pixels differ from Pillow's by 53 dB on average with 2 (46.6 at least), those of 512 by 44 with 1 (33.8)."""
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Smallest and largest share of a picture's area that a training crop keeps. [1, 1] only changes the shape."""
    flip: bool = False
    """Mirror half of the training pictures. Wrong where captions say left and right."""
    color_jitter: list[float] | None = None
    """Largest relative change of brightness, contrast and saturation, and of hue in turns, as in [0.4, 0.4, 0.4, 0.1].
    null changes no colours."""
    randaugment: list[int] | None = None
    """RandAugment: number of operations (up to 8) and magnitude (up to 30), as in [2, 9]. null: none."""
    on_bad: OnBad = OnBad.substitute
    """What stands in for a sample that cannot be decoded: another one of its window, or an empty, masked row."""
    max_bad_fraction: float = 0.01
    """Share of the last 10,000 samples that may be unusable before the run stops. 100 in a row always stop it."""
    on_change: OnChange = OnChange.stop
    """When a run continues with other shards, sources or weights than its checkpoint: `stop`, or `new_segment`, which
    goes on with the new ones. Sources that did not change keep their place."""
    skip_samples: int = 0
    """With `resume=CHECKPOINT`: leave out so many samples after it, rounded up to whole batches, such as those before a
    loss spike. Done once: the same command given again continues its own run. 0: none."""
    epoch_end: EpochEnd = EpochEnd.roll
    """`roll` lets a batch hold the end of one epoch and the start of the next. `drop_last` leaves out what does not
    fill a batch, other samples in each epoch; it needs one source and a fixed global_batch_size."""
    lanes: int = 64
    """Parts of the data that are read side by side. More shuffle better, fewer read fewer shards at a time."""
    window: int = 32768
    """Samples of a lane that are shuffled together."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.train is not None:
            patterns_by_source(self.train)
        self._check_reader()
        if self.cache.public_only and not self.public_only:
            raise UserError("data.cache.public_only=true: for training it is data.public_only=true")
        if self.val is not None and not is_patterns(self.val):
            raise UserError(f"data.val={self.val!r} must be a pattern or a list of patterns")
        self.caption_fields()
        if self.caption_template.count("{}") != 1:
            raise UserError(f"data.caption_template={self.caption_template!r} must hold {{}} once")
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0.0, 0.0)
        if not 0 < low <= high <= 1:
            raise UserError(f"data.crop_scale={self.crop_scale} must be two shares with 0 < first <= second <= 1")
        if not 1 <= self.decode_floor < float("inf"):
            raise UserError(f"data.decode_floor={self.decode_floor} must be at least 1")
        if self.decode_floor != 1 and self.decode != Decode.fast:
            raise UserError(f"data.decode_floor={self.decode_floor} needs data.decode=fast")
        self._check_augmentations()
        if self.workers < 0:
            raise UserError(f"data.workers={self.workers} must not be negative")
        if self.epoch_end == EpochEnd.drop_last and self.train is not None and len(patterns_by_source(self.train)) > 1:
            raise UserError("data.epoch_end=drop_last needs one source; a mixture has no common end of an epoch")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        for name in ("lanes", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)} must be positive")

    def caption_fields(self) -> list[CaptionField]:
        """Return where captions are.

        Raises:
            UserError: a field is not understood, or fields and weights do not match.
        """
        return parse_caption_fields(self.caption, self.caption_weights)

    def _check_augmentations(self) -> None:
        jitter, randaugment = self.color_jitter, self.randaugment
        if jitter is not None and not (
            len(jitter) == 4 and all(0 <= strength < float("inf") for strength in jitter) and jitter[3] <= 0.5
        ):
            raise UserError(f"data.color_jitter={jitter} must be four numbers from 0, the last at most 0.5, or null")
        if randaugment is not None and not (
            len(randaugment) == 2 and 1 <= randaugment[0] <= 8 and 0 <= randaugment[1] <= 30
        ):
            raise UserError(
                f"data.randaugment={randaugment} must be a number of operations in [1, 8] and a magnitude in [0, 30], "
                "or null"
            )

    def _check_reader(self) -> None:
        if self.reader is Reader.indexed:
            if self.num_samples is not None:
                raise UserError(f"data.num_samples={self.num_samples} is for data.reader=streaming; `indexed` counts")
            return
        if self.num_samples is None or self.num_samples < 1:
            raise UserError("data.reader=streaming needs data.num_samples, the samples of an epoch")
        for key, value, only in (
            ("epoch_end", self.epoch_end, EpochEnd.roll), ("on_change", self.on_change, OnChange.stop),
            ("skip_samples", self.skip_samples, 0), ("public_only", self.public_only, False),
        ):  # fmt: skip
            if value != only:
                raise UserError(f"data.{key}={value} needs data.reader=indexed")
        if self.train is not None and not is_patterns(self.train):
            raise UserError(f"data.train={self.train}: data.reader=streaming reads one source, a pattern or a list")

    def open_train(self, *, world: World) -> list[Source]:
        """Open the sources of `train`, indexing them where needed. Every rank calls it.

        Raises:
            UserError: `train` is not set, or shards are missing.
            IntegrityError: a shard or an index is damaged.
        """
        from clip_train.data.captions import caption_extensions
        from clip_train.data.source import open_source

        captions = caption_extensions(self.caption_fields())
        index_dir = None if self.index_dir is None else Path(self.index_dir).expanduser()
        if self.train is None:
            raise UserError("data.train is not set: name the shards, as in data.train='shards/train-{000..009}.tar'")
        by_source = patterns_by_source(self.train)
        fields = {name: "data.train" if name == TRAIN_SOURCE else f"data.train.{name}.shards" for name in by_source}
        cache = replace(self.cache, public_only=self.public_only).build()
        open_one = partial(
            open_source, world=world, captions=captions, index_dir=index_dir, cache=cache,
            counts_from_stats=self.cache.counts_from_stats,
        )  # fmt: skip
        return [open_one(patterns, name=name, field=fields[name]) for name, (patterns, _) in by_source.items()]

    def val_shards(self) -> list[str]:
        """Return the paths or URLs of the held-out shards in order.

        Raises:
            UserError: `val` is not set, or shards are missing.
        """
        from clip_train.data.source import find_shards

        if self.val is None:
            raise UserError("data.val is not set: name the held-out shards, as in data.val=shards/val")
        return find_shards(self.val, field="data.val", public_only=self.public_only)

    def build_train(
        self, *, world: World, seed: int, global_batch_size: int, tokenizer: Tokenizer, image_size: int
    ) -> BatchStream:
        """Open the shards and return this rank's stream of batches. Every rank calls it.

        Raises:
            UserError: shards are missing, the batch cannot be cut into equal parts, or it exceeds the samples.
            IntegrityError: a shard or an index is damaged.
        """
        from clip_train.data.loader import check_divisible
        from clip_train.data.source import warn_of_shared_shards

        check_divisible(global_batch_size, world=world)  # before an index pass that may take minutes
        if self.reader is Reader.streaming:
            return self._streaming(
                world=world, seed=seed, global_batch_size=global_batch_size, tokenizer=tokenizer, image_size=image_size
            )
        sources = self.open_train(world=world)
        warn_of_shared_shards(sources, val=self.val_shards() if self.val is not None else [])
        return self.stream(
            sources, world=world, seed=seed, global_batch_size=global_batch_size, tokenizer=tokenizer,
            image_size=image_size,
        )  # fmt: skip

    def stream(
        self, sources: list[Source], *, world: World, seed: int, global_batch_size: int, tokenizer: Tokenizer,
        image_size: int,
    ) -> TrainStream:  # fmt: skip
        """Return a rank's stream over sources that `open_train` opened. Needs no other rank.

        Raises:
            UserError: there are fewer samples than a batch holds.
        """
        from clip_train.data.loader import TrainStream

        weights = [weight for _, weight in patterns_by_source(self.train).values() if weight is not None]
        return TrainStream(
            sources,
            weights=weights or None,
            world=world,
            seed=seed,
            global_batch_size=global_batch_size,
            filler=self._filler(seed=seed, tokenizer=tokenizer, image_size=image_size),
            workers=self.workers,
            lanes=self.lanes,
            window=self.window,
            substitute=self.on_bad == OnBad.substitute,
            max_bad_fraction=self.max_bad_fraction,
            drop_last=self.epoch_end == EpochEnd.drop_last,
            new_segment=self.on_change == OnChange.new_segment,
        )

    def _streaming(
        self, *, world: World, seed: int, global_batch_size: int, tokenizer: Tokenizer, image_size: int
    ) -> BatchStream:
        from clip_train.data.captions import caption_extensions
        from clip_train.data.source import find_streams
        from clip_train.data.streaming.loader import StreamingTrainStream

        if self.train is None:
            raise UserError("data.train is not set: name the shards, as in data.train='pipe:cat train-{000..009}.tar'")
        assert self.num_samples is not None
        return StreamingTrainStream(
            find_streams(self.train, field="data.train", allow_pipe=self.allow_pipe),
            num_samples=self.num_samples,
            captions=caption_extensions(self.caption_fields()),
            filler=self._filler(seed=seed, tokenizer=tokenizer, image_size=image_size),
            world=world,
            seed=seed,
            global_batch_size=global_batch_size,
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
        )

    def _filler(self, *, seed: int, tokenizer: Tokenizer, image_size: int) -> RowFiller:
        from clip_train.data.captions import CaptionChooser
        from clip_train.data.dataset import RowFiller

        return RowFiller(
            seed=seed,
            transform=self.transform(image_size=image_size),
            captions=CaptionChooser(self.caption_fields(), template=self.caption_template),
            tokenizer=tokenizer,
        )

    def transform(self, *, image_size: int) -> TrainTransform:
        """Return what turns a file into the pixels of a training row."""
        from clip_train.data.images.augment import ColorJitter, RandAugment
        from clip_train.data.images.transforms import Augmentation, TrainTransform

        augmentations: list[Augmentation] = []
        if self.randaugment is not None:
            num_operations, magnitude = self.randaugment
            augmentations.append(RandAugment(num_operations=num_operations, magnitude=magnitude))
        if self.color_jitter is not None:
            brightness, contrast, saturation, hue = self.color_jitter
            augmentations.append(ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue))
        low, high = self.crop_scale
        return TrainTransform(
            image_size=image_size,
            crop_scale=(low, high),
            flip=self.flip,
            decode_floor=self.decode_floor if self.decode == Decode.fast else None,
            augmentations=tuple(augmentations),
        )
