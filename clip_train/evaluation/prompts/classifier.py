"""The zero-shot classifier: one vector per class from its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
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
from clip_train.evaluation.prompts.files import Templates, prompts_of
from clip_train.evaluation.prompts.memo import memo_key, recall, remember

if TYPE_CHECKING:
    from clip_train.distributed.world import World


class ZeroShotClassifier(NamedTuple):
    """Class vectors, each stored once per distinct name, so that classes with one name tie exactly."""

    vectors: Tensor  # [U, D] float32, unit length
    rows: Tensor  # [C] int64 in [0, U), the vector of each class

    def cosines(self, image_features: Tensor) -> Tensor:
        """Return the cosines [B, C] of unit image features [B, D] with every class."""
        return similarity(image_features, self.vectors)[:, self.rows]


class ClassPrompts(NamedTuple):
    """The prompts of every distinct class name, name after name."""

    texts: TokenizedTexts
    counts: list[int]  # [U] prompts of each distinct name
    rows: Tensor  # [C] int64 in [0, U), the name of each class


def tokenize_prompts(tokenizer: Tokenizer, *, classnames: Sequence[str], templates: Templates) -> ClassPrompts:
    """Tokenize the prompts of every distinct name."""
    place = {name: i for i, name in enumerate(dict.fromkeys(classnames))}
    prompts = [prompts_of(name, templates=templates) for name in place]
    texts = tokenize_texts(tokenizer, [prompt for own in prompts for prompt in own])
    return ClassPrompts(texts, [len(own) for own in prompts], torch.tensor([place[name] for name in classnames]))


def build_classifier(model: DualEncoder, prompts: ClassPrompts, *, world: World) -> ZeroShotClassifier:
    """Encode the prompts, average the unit features per class and normalise again.

    All ranks take part and hold the same result (CLIP, Radford et al. 2021, §3.1.4).
    """
    return build_ensembles(model, prompts, world=world)[0]


def build_ensembles(
    model: DualEncoder, prompts: ClassPrompts, *, world: World, parts: Sequence[Sequence[int]] = ()
) -> list[ZeroShotClassifier]:
    """Return the classifier of all prompts and, from the same features, those of only some templates.

    Large ones are remembered by hashes (`memo.py`): sets with the same classes and weights share them.

    Args:
        model: with its text tower.
        prompts: of `tokenize_prompts`.
        world: the ranks.
        parts: places of the templates of each further classifier.
    """
    tokens, layout = prompts.texts.tokens, (prompts.texts.rows, torch.tensor(prompts.counts), prompts.rows)
    key = memo_key(model, tokens=tokens, layout=layout, parts=parts, world=world)
    if (known := recall(model, key)) is not None:
        return known
    texts = encode_texts(model, prompts.texts, world=world)
    per_class = texts.features[texts.rows].split(prompts.counts)  # U times [P, D]
    rows = prompts.rows.to(world.device)
    ensembles = [
        ZeroShotClassifier(
            F.normalize(torch.stack([(own if part is None else own[list(part)]).mean(dim=0) for own in per_class])),
            rows,
        )
        for part in (None, *parts)
    ]
    remember(model, key, ensembles)
    return ensembles
