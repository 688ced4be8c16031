"""Choices of `evaluation.NAME` with the name `probe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.probe.evaluator import Probe


class ProbeFeatures(StrEnum):
    pooled = "pooled"
    projected = "projected"


@dataclass(slots=True, kw_only=True)
class ProbeConfig(EvaluationConfig):
    """Linear probe: logistic regression on frozen image features (CLIP, Radford et al. 2021, appendix A.3)."""

    name: str = "probe"
    root: str = "???"
    """Folder with labelled images in `TRAIN_SPLIT/` and `SPLIT/`: classes as folders, or clip-benchmark's layout."""
    split: str = "test"
    """The part of `root` that is scored."""
    train_split: str = "train"
    """The part of `root` that is learned from; a fifth of it chooses C."""
    features: ProbeFeatures = ProbeFeatures.pooled
    """`pooled`: of the image tower before the projection; `projected`: in the shared embedding, not brought to unit
    length."""
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Images per class of the few-shot probes, each drawn three times; empty: none."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        EvaluationConfig.__post_init__(self)
        if self.shots and min(self.shots) < 1:
            raise UserError(f"shots={list(self.shots)} must list integers of at least 1")
        if self.split == self.train_split:
            raise UserError(f"train_split={self.train_split} is what is scored: choose another part")

    def missing(self) -> str | None:
        """Return the part of `root` that is not there."""
        parts = [Path(self.root).expanduser() / part for part in (self.train_split, self.split)]
        return next((str(part) for part in parts if not part.is_dir()), None)

    def open(self, setting: Setting) -> Probe:
        """Open both parts and make the evaluator. Every rank reads the same lists of images."""
        from clip_train.evaluation.classify.labelled_images import open_labelled_images
        from clip_train.evaluation.probe.evaluator import Probe

        if missing := self.missing():
            raise UserError(f"{missing} is not a folder: a probe needs images to learn from and others to be scored on")
        train, test = (
            open_labelled_images(self.root, split=part, classnames="auto", templates="single")
            for part in (self.train_split, self.split)
        )
        if list(train.classnames) != list(test.classnames):
            raise UserError(f"{self.root}: {self.train_split} and {self.split} have different classes")
        return Probe(train, test, features=self.features.value, shots=sorted(set(self.shots)), setting=setting)
