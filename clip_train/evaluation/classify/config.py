"""Choices of `evaluation.NAME` with the name `classify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.evaluation.config import EvaluationConfig, missing_shards, names_shards

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Evaluator, Setting


@dataclass(slots=True, kw_only=True)
class ClassifyConfig(EvaluationConfig):
    """Zero-shot classification from class names and prompt templates (CLIP, Radford et al. 2021, §3.1)."""

    name: str = "classify"
    root: str = "???"
    """Folder of labelled images: clip-benchmark's layout (`classnames.txt`, `SPLIT/nshards.txt`, `SPLIT/0.tar` …), or
    one folder of images per class or shards with a `.cls`, directly in it or in `SPLIT/`. Or a `.csv` or `.tsv` with a
    column `path` and a column `label`, or a pattern of shards. Also ImageNet, its shifts and ObjectNet as published."""
    split: str = "test"
    """Which part of `root`; ignored where class folders lie directly in it."""
    classnames: str = "auto"
    """`auto` (`classnames.txt` in `root`, or the names of folders and labels), `imagenet`, or a text file with one name
    per line."""
    templates: str = "auto"
    """`auto` (the file in `root`; else `imagenet` for ImageNet's class folders, else `single`), `imagenet` (80),
    `simple` (7), `single` (`a photo of a {}.`), a template with `{}` or `{c}` for the name, a text file with one per
    line, or a `.json` file with the prompts of each class: `{"cat": ["a cat", …], …}`."""

    label_column: str | None = None
    """Column of a table that holds the label; null: `label`, `class` or another usual name."""

    def missing(self) -> str | None:
        """Return `root` if it is not there."""
        if names_shards(self.root):
            return missing_shards(self.root, field="root", public_only=self.cache.public_only)
        return None if Path(self.root).expanduser().exists() else self.root

    def open(self, setting: Setting) -> Evaluator:
        """Open the images and make the evaluator. Every rank reads the same list of images."""
        from clip_train.evaluation.classify.evaluator import Classify
        from clip_train.evaluation.classify.labelled_images import open_labelled_images

        images = open_labelled_images(
            self.root, split=self.split, classnames=self.classnames, templates=self.templates,
            label_column=self.label_column, cache=self.cache.build(),
        )  # fmt: skip
        return Classify(images, setting=setting)
