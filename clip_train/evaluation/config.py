"""What the choices of `evaluation.NAME` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from clip_train.data.remote.config import CacheConfig
from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource
    from clip_train.distributed.world import World
    from clip_train.evaluation.evaluator import Evaluator, Setting
    from clip_train.evaluation.features import Batches, Tokenizer


@dataclass(slots=True, kw_only=True)
class ReferenceConfig:
    """Whether another tool confirms our numbers, in place of an evaluation."""

    python: str | None = None
    """A Python with clip-benchmark: it evaluates the exported model on generated sets, and every score must be ours to
    1e-6. The sets and both results go to `output`, if that is given. null: evaluate."""
    imagenet: bool = False
    """Compare on generated pictures of ImageNet's 1,000 classes too: 80,000 prompts, minutes."""


@dataclass(slots=True, kw_only=True)
class BenchmarkConfig:
    """What is published about a set, for the table and the means of a suite."""

    task: str | None = None
    """The set's name in `results.jsonl`, such as `vtab/dtd`; null: the evaluation's."""
    title: str | None = None
    """What people call it, for `results.jsonl`; null: the evaluation's name."""
    metric: str | None = None
    """The metric that counts, `PART/METRIC` for that of one part; null: the set counts in no mean."""
    part_of: list[str] = field(default_factory=list)
    """Means of a suite that the set counts in, besides the one over all."""
    images: int | None = None
    """Images, or items, as published; another number is remarked. null: not stated."""
    classes: int | None = None
    """Classes as published; another number is remarked. null: not stated."""
    chance: float | None = None
    """Level of guessing as published, in [0, 1]; null: the evaluator's own."""


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def names_shards(place: str) -> bool:
    """Return whether a place is a pattern of shards or one on another machine, not a local folder."""
    return ".tar" in place or "://" in place


def missing_shards(patterns: str | Sequence[str], *, field: str, public_only: bool) -> str | None:
    """Return what is wrong with a pattern of shards, None if there are such shards."""
    from clip_train.data.source import find_shards

    try:
        find_shards(patterns, field=field, public_only=public_only)
    except UserError as error:
        return str(error)
    return None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put `evaluation.NAME: ` before a user's error within: the config of an evaluation does not know its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluation.{name}: {error}") from error


@dataclass(slots=True, kw_only=True)
class EvaluationConfig:
    """Fields that every evaluation has."""

    name: str = "???"
    every: int | None = None
    """Steps between two evaluations during training; null or 0: only after its last step."""
    batch_size: int = 128
    """Images per rank and forward pass. It changes memory and speed, not the result."""
    workers: int = 0
    """Processes that decode images for each rank; 0 decodes in the rank's own process."""
    precision: Precision = Precision.auto
    """Of the towers: `auto` is bf16 on CUDA and fp32 elsewhere. In a run with `distributed=fsdp` they keep the run's
    precision. Similarities are always fp32."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where remote shards of the set lie while they are read, as `data.cache`, which `val` takes."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise UserError(f"every={self.every} must be 0 (only at the end) or a number of steps")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if self.workers < 0:
            raise UserError(f"workers={self.workers} must not be negative")

    def missing(self) -> str | None:
        """Return where the evaluation set was looked for and is not; None if it is there."""
        raise NotImplementedError

    def build(self, *, world: World, tokenizer: Tokenizer, image_size: int, squash: bool = False) -> Evaluator:
        """Open the evaluation set and make the evaluator. Every rank calls this.

        Args:
            world: the ranks.
            tokenizer: the model's own.
            image_size: side of the model's input in pixels.
            squash: pictures are resized without keeping their shape.
        """
        from clip_train.data.sequential import evaluation_batches
        from clip_train.evaluation.evaluator import Setting

        def read(source: ImageSource) -> Batches:
            return lambda: evaluation_batches(
                source,
                world=world,
                image_size=image_size,
                squash=squash,
                batch_size=self.batch_size,
                workers=self.workers,
            )

        return self.open(
            Setting(
                world=world, tokenizer=tokenizer, read=read, image_size=image_size, precision=self.precision.value
            )
        )  # fmt: skip

    def open(self, setting: Setting) -> Evaluator:
        """Open the set. Every rank reads the same list of images."""
        raise NotImplementedError
