"""Choices of `evaluation.NAME`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.evaluation.classify import Classify
    from clip_train.evaluation.features import Tokenizer
    from clip_train.evaluation.retrieve import Retrieve


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


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
    """Of the towers: `auto` is bf16 on CUDA and fp32 elsewhere. Similarities are always fp32."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise UserError(f"evaluation.every={self.every} must be 0 (only at the end) or a number of steps")
        if self.batch_size < 1:
            raise UserError(f"evaluation.batch_size={self.batch_size} must be at least 1")
        if self.workers < 0:
            raise UserError(f"evaluation.workers={self.workers} must not be negative")

    def missing(self) -> str | None:
        """Return where the evaluation set was looked for and is not; None if it is there."""
        raise NotImplementedError

    def build(
        self, *, world: World, tokenizer: Tokenizer, image_size: int, squash: bool = False
    ) -> Classify | Retrieve:
        """Open the evaluation set and make the evaluator. Every rank calls this."""
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class ClassifyConfig(EvaluationConfig):
    """Zero-shot classification from class names and prompt templates (CLIP, Radford et al. 2021, §3.1)."""

    name: str = "classify"
    root: str = "???"
    """Folder of labelled images: clip-benchmark's layout (`classnames.txt`, `SPLIT/nshards.txt`, `SPLIT/0.tar` …),
    or one folder of images per class, directly in it or in `SPLIT/`."""
    split: str = "test"
    """Which part of `root`; ignored where class folders lie directly in it."""
    classnames: str = "auto"
    """`auto` (the file or folder names in `root`), `imagenet`, or a text file with one name per line."""
    templates: str = "auto"
    """`auto` (the file in `root`; else `imagenet` for ImageNet's class folders, else `single`), `imagenet` (80),
    `simple` (7), `single` (`a photo of a {}.`), or a text file of templates, one per line, with `{}` or `{c}` for the
    name."""

    def missing(self) -> str | None:
        """Return `root` if it is not a folder."""
        return None if Path(self.root).is_dir() else self.root

    def build(self, *, world: World, tokenizer: Tokenizer, image_size: int, squash: bool = False) -> Classify:
        """Open the images and make the evaluator. Every rank reads the same list of images."""
        from clip_train.data.sequential import evaluation_batches
        from clip_train.evaluation.classify import Classify
        from clip_train.evaluation.labelled_images import open_labelled_images

        images = open_labelled_images(
            self.root, split=self.split, classnames=self.classnames, templates=self.templates
        )  # fmt: skip
        return Classify(
            images,
            world=world,
            tokenizer=tokenizer,
            precision=self.precision.value,
            batches=lambda: evaluation_batches(
                images.source,
                world=world,
                image_size=image_size,
                squash=squash,
                batch_size=self.batch_size,
                workers=self.workers,
            ),
        )


@dataclass(slots=True, kw_only=True)
class RetrieveConfig(EvaluationConfig):
    """Image-to-text and text-to-image recall on image-caption pairs."""

    name: str = "retrieve"
    shards: Any = "???"
    """Shards: a folder, a pattern such as `DIR/val-{00000..00003}.tar`, or a list of these; each image has a `.txt`
    with one caption per line."""
    recall_k: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The k of recall@k; one larger than the gallery is left out, with a warning."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        EvaluationConfig.__post_init__(self)
        if not self.shards or not isinstance(self.shards, str | list):
            raise UserError(f"evaluation.{self.name}.shards={self.shards} must name shards; for `val` set data.val")
        if not self.recall_k or min(self.recall_k) < 1:
            raise UserError(f"evaluation.recall_k={list(self.recall_k)} must list integers of at least 1")

    def missing(self) -> str | None:
        """Return what `shards` names but is not there."""
        from clip_train.data.source import expand_shards

        try:
            expand_shards(self.shards, field=f"evaluation.{self.name}.shards")
        except UserError as error:
            return str(error)
        return None

    def build(self, *, world: World, tokenizer: Tokenizer, image_size: int, squash: bool = False) -> Retrieve:
        """Open the pairs and make the evaluator. Every rank reads the same list of pairs."""
        from clip_train.data.sequential import evaluation_batches
        from clip_train.evaluation.captioned_images import open_captioned_images
        from clip_train.evaluation.retrieve import Retrieve

        images = open_captioned_images(self.shards)
        return Retrieve(
            images,
            world=world,
            tokenizer=tokenizer,
            precision=self.precision.value,
            recall_k=list(self.recall_k),
            batches=lambda: evaluation_batches(
                images.source,
                world=world,
                image_size=image_size,
                squash=squash,
                batch_size=self.batch_size,
                workers=self.workers,
            ),
        )
