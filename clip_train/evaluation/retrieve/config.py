"""Choices of `evaluation.NAME` with the name `retrieve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.data.caption_fields import parse_caption_fields
from clip_train.errors import UserError
from clip_train.evaluation.config import EvaluationConfig, missing_shards

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.retrieve.evaluator import Retrieve


@dataclass(slots=True, kw_only=True)
class RetrieveConfig(EvaluationConfig):
    """Image-to-text and text-to-image recall on image-caption pairs."""

    name: str = "retrieve"
    shards: Any = None
    """Shards: clip-benchmark's layout (a folder with `SPLIT/nshards.txt`), any folder of shards, a pattern such as
    `DIR/val-{00000..00003}.tar`, or a list of these; each image has a `.txt` with one caption per line, or what
    `caption` says. Give this or `annotations`."""
    caption: Any = "txt"
    """Where the captions of shards are, as `data.caption`. All of a list, and of several fields, are the image's."""
    annotations: str | None = None
    """In place of shards, a file: COCO captions or Karpathy's splits (`.json`), a table with a column of picture paths
    and a column of captions (`.csv`, `.tsv`, `.jsonl`, `.parquet`), or lines `picture.jpg,caption` (`.txt`)."""
    images: str | None = None
    """Folder where the picture paths of `annotations` start; null: looked for beside the file."""
    split: str = "test"
    """Which part of clip-benchmark's layout or of Karpathy's splits."""
    recall_k: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The k of recall@k; one larger than the gallery is left out, with a warning."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        EvaluationConfig.__post_init__(self)
        if bool(self.shards) == bool(self.annotations) or not isinstance(self.shards, str | list | None):
            raise UserError(
                f"shards={self.shards} and annotations={self.annotations}: give one of them, shards or a file of "
                "captions; for `val` set data.val"
            )
        if self.images is not None and self.annotations is None:
            raise UserError(f"images={self.images} is only for annotations=FILE")
        parse_caption_fields(self.caption, None)
        if not self.recall_k or min(self.recall_k) < 1:
            raise UserError(f"recall_k={list(self.recall_k)} must list integers of at least 1")

    def missing(self) -> str | None:
        """Return what `shards` or `annotations` names but is not there."""
        if self.annotations is not None:
            return None if Path(self.annotations).expanduser().is_file() else self.annotations
        if isinstance(self.shards, str):
            folder = Path(self.shards).expanduser()
            if (folder / self.split / "nshards.txt").is_file():
                return None
            if not folder.exists() and not set("*?{[:") & set(self.shards):
                return self.shards
        return missing_shards(self.shards, field=f"evaluation.{self.name}.shards", public_only=self.cache.public_only)

    def open(self, setting: Setting) -> Retrieve:
        """Open the pairs and make the evaluator. Every rank reads the same list of pairs."""
        from clip_train.evaluation.retrieve.annotations import open_annotations
        from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
        from clip_train.evaluation.retrieve.evaluator import Retrieve

        if self.annotations is not None:
            images = open_annotations(self.annotations, images=self.images, split=self.split)
        else:
            images = open_captioned_shards(
                self.shards, caption=self.caption, split=self.split, cache=self.cache.build()
            )
        return Retrieve(images, setting=setting, recall_k=list(self.recall_k))
