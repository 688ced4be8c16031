"""Choices of `evaluation.NAME` with the name `choose`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.evaluation.config import EvaluationConfig, missing_shards

if TYPE_CHECKING:
    from clip_train.evaluation.choose.evaluator import Choose
    from clip_train.evaluation.evaluator import Setting


@dataclass(slots=True, kw_only=True)
class ChooseConfig(EvaluationConfig):
    """The right caption of a picture, or the right picture of a caption, among a few that are hard to tell apart."""

    name: str = "choose"
    path: str = "???"
    """The items: a `.jsonl` or `.json` file or a folder of them (our own rows, or SugarCrepe's, Winoground's, ARO's and
    CountBench's as published), or shards whose samples have a `.json` with `captions` and `answer`."""
    images: str | None = None
    """Folder of the pictures; null: `val2017` or `images` beside the items if there is one, else their own folder."""

    def missing(self) -> str | None:
        """Return what `path` names but is not there."""
        from clip_train.evaluation.choose.files import find_rows

        try:
            return (
                None
                if find_rows(self.path)
                else missing_shards(self.path, field="path", public_only=self.cache.public_only)
            )
        except UserError as error:
            return str(error)

    def open(self, setting: Setting) -> Choose:
        """Open the items and make the evaluator. Every rank reads the same list of pictures."""
        from clip_train.evaluation.choose.evaluator import Choose
        from clip_train.evaluation.choose.files import open_choices

        return Choose(
            open_choices(self.path, images=self.images, cache=self.cache.build()), setting=setting
        )  # fmt: skip
