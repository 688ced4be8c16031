"""A labelled set of images, opened from any of the layouts that sets come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.errors import UserError
from clip_train.evaluation.config import names_shards
from clip_train.evaluation.prompts.files import Templates

if TYPE_CHECKING:
    from clip_train.data.remote.cache import ShardCache
    from clip_train.data.sequential import ImageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """Images with their classes, and how the classes are put into words."""

    source: ImageSource
    labels: np.ndarray
    """[N] int64 in [0, C), one class per image; or [N, C] bool, any number of classes per image."""
    classnames: Sequence[str]
    """C names in class order. They may repeat: never key by them."""
    templates: Templates
    warnings: list[str] = field(default_factory=list)
    """What is odd about the set, for whoever reads its scores."""

    @property
    def multilabel(self) -> bool:
        """Return whether an image may belong to several classes, or to none."""
        return self.labels.ndim == 2


def open_labelled_images(
    root: str, *, split: str, classnames: str, templates: str, label_column: str | None = None,
    cache: ShardCache | None = None,
) -> LabelledImages:  # fmt: skip
    """Open the images of `root`; the arguments are the fields of `ClassifyConfig`, and the cache for remote shards.

    Raises:
        UserError: the folder, names or templates do not fit together.
        IntegrityError: a label is missing or out of range.
    """
    from clip_train.data.shards.benchmark import has_layout, splits_of
    from clip_train.evaluation.classify.folders import open_folders
    from clip_train.evaluation.classify.shards import open_layout, open_shards
    from clip_train.evaluation.classify.table import TABLE_SUFFIXES, open_table

    path = Path(root).expanduser()
    choices = {"classnames": classnames, "templates": templates}
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return open_table(path, label_column=label_column, **choices)
    if names_shards(root):
        return open_shards(root, root=path.parent, cache=cache, **choices)
    if not path.is_dir():
        raise UserError(
            f"root={root} is not a folder, a table ({', '.join(TABLE_SUFFIXES)}) or a pattern of .tar files"
        )
    if has_layout(path, split=split):
        return open_layout(path, split=split, **choices)
    base = path / split if (path / split).is_dir() else path
    if any(base.glob("*.tar")):
        return open_shards(str(base), root=path, cache=cache, **choices)
    if base is path and (splits := splits_of(path)):
        raise UserError(f"{path} has no split={split}; it has {', '.join(splits)}")
    return open_folders(base, root=path, **choices)
