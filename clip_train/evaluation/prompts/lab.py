"""Score prompt templates on image features that are computed once, and choose an ensemble of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.evaluation.confidence import bootstrap
from clip_train.evaluation.features import DualEncoder, Tokenizer, encode_texts, similarity, to_numpy
from clip_train.evaluation.prompts.classifier import tokenize_prompts

if TYPE_CHECKING:
    from clip_train.distributed.world import World

CHUNK_ELEMENTS = 2**24  # similarities held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLab:
    """Features of labelled images, and of every template of every class: a template's worth is one product away."""

    image_features: Tensor
    """[N, D] unit length."""
    labels: np.ndarray
    """[N] int64 in [0, C)."""
    template_vectors: Tensor
    """[P, U, D] unit length, of each template and distinct class name."""
    first_class: Tensor
    """[U] int64, the lowest class with each name."""

    def hits(self, templates: Sequence[int], images: np.ndarray) -> np.ndarray:
        """Return whether the ensemble of some templates is right, [n] bool, for a choice [N] bool of the images.

        The vectors of the templates are averaged and brought to unit length, as zero-shot classification does.
        """
        classes = F.normalize(self.template_vectors[list(templates)].mean(dim=0), dim=-1)  # [U, D]
        chosen = self.image_features[torch.from_numpy(images).to(self.image_features.device)]
        pieces = chosen.split(max(1, CHUNK_ELEMENTS // len(classes)))
        answers = torch.cat([self.first_class[similarity(piece, classes).argmax(dim=1)] for piece in pieces])
        return to_numpy(answers) == self.labels[images]

    def accuracy(self, templates: Sequence[int], images: np.ndarray) -> float:
        """Return the share of right answers of the ensemble of some templates."""
        return float(self.hits(templates, images).mean())


def encode_templates(
    model: DualEncoder, *, tokenizer: Tokenizer, classnames: Sequence[str], templates: Sequence[str], world: World
) -> tuple[Tensor, Tensor]:
    """Return `template_vectors` [P, U, D] and `first_class` [U] of a `PromptLab`."""
    prompts = tokenize_prompts(tokenizer, classnames=classnames, templates=templates)
    texts = encode_texts(model, prompts.texts, world=world)
    of_name = texts.features[texts.rows].unflatten(0, (-1, len(templates)))  # [U, P, D]
    names = list(dict.fromkeys(classnames))
    first_class = torch.tensor([list(classnames).index(name) for name in names], device=of_name.device)
    return of_name.transpose(0, 1).contiguous(), first_class


def choose_ensemble(lab: PromptLab, images: np.ndarray, *, most: int) -> list[int]:
    """Return the templates of a good small ensemble, found on `images` alone.

    Forward: the template that helps most joins, until none helps or there are `most`. Backward: a template leaves as
    long as nothing is lost without it. Of equals the earlier template is taken, and the later one leaves.

    Args:
        lab: the features.
        images: [N] bool, those to choose on.
        most: templates.
    """
    chosen: list[int] = []
    best = -1.0
    while len(chosen) < min(most, len(lab.template_vectors)):
        rest = [t for t in range(len(lab.template_vectors)) if t not in chosen]
        accuracy, negative = max((lab.accuracy([*chosen, t], images), -t) for t in rest)
        if accuracy <= best:
            break
        chosen, best = [*chosen, -negative], accuracy
    while len(chosen) > 1:
        accuracy, place = max((lab.accuracy([*chosen[:i], *chosen[i + 1 :]], images), i) for i in range(len(chosen)))
        if accuracy < best:
            break
        best, chosen = accuracy, [*chosen[:place], *chosen[place + 1 :]]
    return chosen


def paired_gain(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the difference of two accuracies on the same images, and its 95 % interval.

    Args:
        ours: [n] bool, right answers.
        theirs: [n] bool.
    """
    difference = ours.astype(np.int64) - theirs.astype(np.int64)
    kinds = np.array([-1, 0, 1])
    counts = np.array([(difference == kind).sum() for kind in kinds])
    return float(difference.mean()), bootstrap(lambda drawn: float(drawn @ kinds / drawn.sum()), counts=counts)
