"""The zero-shot classifier: one vector per class from its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from clip_train.evaluation.features import (
    DualEncoder,
    TokenizedTexts,
    Tokenizer,
    encode_texts,
    similarity,
    tokenize_texts,
)
from clip_train.evaluation.prompts.files import fill

if TYPE_CHECKING:
    from clip_train.distributed.world import World


class ZeroShotClassifier(NamedTuple):
    """Class vectors, each stored once per distinct name, so that classes with one name tie exactly."""

    vectors: Tensor  # [U, D] float32, unit length
    rows: Tensor  # [C] int64 in [0, U), the vector of each class

    def cosines(self, image_features: Tensor) -> Tensor:
        """Return the cosines [B, C] of unit image features [B, D] with every class."""
        return similarity(image_features, self.vectors)[:, self.rows]


def tokenize_prompts(tokenizer: Tokenizer, *, classnames: Sequence[str], templates: Sequence[str]) -> TokenizedTexts:
    """Tokenize every template of every distinct name, name after name."""
    names = dict.fromkeys(classnames)
    return tokenize_texts(tokenizer, [fill(template, classname=name) for name in names for template in templates])


def build_classifier(
    model: DualEncoder, prompts: TokenizedTexts, *, classnames: Sequence[str], world: World
) -> ZeroShotClassifier:
    """Encode the prompts, average the unit features per class and normalise again.

    All ranks take part and hold the same result (CLIP, Radford et al. 2021, §3.1.4).

    Args:
        model: with its text tower.
        prompts: of `tokenize_prompts` for the same names.
        classnames: C names in class order.
        world: the ranks.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(classnames))}
    texts = encode_texts(model, prompts, world=world)
    per_class = texts.features[texts.rows].unflatten(0, (len(place), -1))  # [U, P, D]
    vectors = F.normalize(per_class.mean(dim=1), dim=-1)
    return ZeroShotClassifier(vectors, texts.rows.new_tensor([place[name] for name in classnames]))
