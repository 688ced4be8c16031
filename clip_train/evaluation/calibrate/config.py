"""Choices of `evaluation.NAME` with the name `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_train.errors import UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.config import missing_shards

if TYPE_CHECKING:
    from clip_train.evaluation.calibrate.evaluator import Calibrate
    from clip_train.evaluation.evaluator import Setting


@dataclass(slots=True, kw_only=True)
class CalibrateConfig(ClassifyConfig):
    """The temperature of a model's probabilities, fitted on one half of a set and judged on the other."""

    name: str = "calibrate"
    root: str = ""
    """Folder of labelled images, as `classify` reads it; empty: `shards` are given."""
    shards: Any = None
    """Instead of `root`: image-caption pairs, as `retrieve` reads them. The labels are then the first captions of the
    images of the same half."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        ClassifyConfig.__post_init__(self)
        if bool(self.root) == bool(self.shards):
            raise UserError("give root=DIR (labelled images) or shards=PATTERN (image-caption pairs), one of them")

    def missing(self) -> str | None:
        """Return `root` if it is not there, or what is wrong with the shards."""
        if self.root:
            return ClassifyConfig.missing(self)
        return missing_shards(self.shards, field=f"evaluation.{self.name}.shards", public_only=self.cache.public_only)

    def open(self, setting: Setting) -> Calibrate:
        """Open the images and make the evaluator. Every rank reads the same list of images."""
        from clip_train.evaluation.calibrate.evaluator import Calibrate
        from clip_train.evaluation.classify.labelled_images import open_labelled_images
        from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards

        cache = self.cache.build()
        if not self.root:
            pairs = open_captioned_shards(self.shards, cache=cache)
            return Calibrate(pairs, setting=setting, data=str(self.shards))
        images = open_labelled_images(
            self.root, split=self.split, classnames=self.classnames, templates=self.templates,
            label_column=self.label_column, cache=cache,
        )  # fmt: skip
        return Calibrate(images, setting=setting, data=self.root)
