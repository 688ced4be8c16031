"""Choices of `evaluation.NAME` with the name `reject`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clip_train.evaluation.classify.config import ClassifyConfig

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.reject.evaluator import Reject


@dataclass(slots=True, kw_only=True)
class RejectConfig(ClassifyConfig):
    """Tell pictures of known classes from foreign ones, and find the threshold below which the model does not know."""

    name: str = "reject"
    foreign: dict[str, str] = field(default_factory=dict)
    """Name -> folder of pictures or shards that show none of the classes; `generated` draws those that are named
    `blank`, `noise`, `text` or `shapes`. Empty: these four."""
    lexicon: str | None = "imagenet"
    """Words for the score `negative_labels`: `imagenet` (its class names) or a text file with one per line; those that
    are farthest from the classes are taken. null: without this score."""

    def missing(self) -> str | None:
        """Return the first of `root` and the foreign sets that is not there."""
        from clip_train.evaluation.reject.sets import missing_foreign

        return ClassifyConfig.missing(self) or missing_foreign(self.foreign, public_only=self.cache.public_only)

    def open(self, setting: Setting) -> Reject:
        """Open the known and the foreign pictures and make the evaluator. Every rank reads the same lists."""
        from clip_train.evaluation.classify.labelled_images import open_labelled_images
        from clip_train.evaluation.reject.evaluator import Reject
        from clip_train.evaluation.reject.sets import load_lexicon, open_foreign

        cache = self.cache.build()
        known = open_labelled_images(
            self.root, split=self.split, classnames=self.classnames, templates=self.templates,
            label_column=self.label_column, cache=cache,
        )  # fmt: skip
        foreign = open_foreign(self.foreign, image_size=setting.image_size, cache=cache)
        return Reject(known, foreign=foreign, lexicon=load_lexicon(self.lexicon), setting=setting, data=self.root)
