"""Choices of `evaluation.NAME` with the name `retrieve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clip_train.errors import UserError
from clip_train.evaluation.config import EvaluationConfig, missing_shards

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.retrieve.evaluator import Retrieve


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
        return missing_shards(self.shards, field=f"evaluation.{self.name}.shards")

    def open(self, setting: Setting) -> Retrieve:
        """Open the pairs and make the evaluator. Every rank reads the same list of pairs."""
        from clip_train.evaluation.retrieve.captioned_images import open_captioned_images
        from clip_train.evaluation.retrieve.evaluator import Retrieve

        return Retrieve(open_captioned_images(self.shards), setting=setting, recall_k=list(self.recall_k))
