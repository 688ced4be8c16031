"""Scores of how sure it is that a picture shows one of the labels, from its cosines with them. Higher is surer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_train.calibration import RejectScore
from clip_train.evaluation.features import similarity

NEGATIVE_SHARE = 0.15
NEAR_QUANTILE = 0.95


def reject_scores(
    cosines: Tensor, *, logit_scale: float, negative_cosines: Tensor | None = None
) -> dict[RejectScore, Tensor]:
    """Return every score [B] of pictures with cosines [B, C], C at least 2.

    - `max_cosine`: the highest cosine. It hardly depends on how many labels there are.
    - `mcm`: the highest softmax probability of the plain cosines, temperature 1 (Ming et al. 2022, arXiv 2211.13445).
    - `msp`: the highest softmax probability at the model's temperature (Hendrycks & Gimpel 2017, arXiv 1610.02136).
    - `margin`: the highest cosine minus the second.
    - `energy`: the logarithm of the summed exponentials of the logits, in units of cosines (Liu et al. 2020,
      arXiv 2010.03759).
    - `negative_labels`: the probability of all labels together, in a softmax over them and words that do not belong
      to them (Jiang et al. 2024, arXiv 2403.20078). Only where there are such words.

    Args:
        cosines: [B, C] float32, with the labels.
        logit_scale: the factor that turns cosines into the model's logits.
        negative_cosines: [B, M] float32, with words of `negative_words`.
    """
    best_two = cosines.topk(2, dim=1).values
    logits = logit_scale * cosines
    mass = logits.logsumexp(dim=1)
    scores = {
        RejectScore.max_cosine: best_two[:, 0],
        RejectScore.mcm: (best_two[:, 0] - cosines.logsumexp(dim=1)).exp(),
        RejectScore.msp: (logit_scale * best_two[:, 0] - mass).exp(),
        RejectScore.margin: best_two[:, 0] - best_two[:, 1],
        RejectScore.energy: mass / logit_scale,
    }
    if negative_cosines is not None:
        scores[RejectScore.negative_labels] = torch.sigmoid(mass - (logit_scale * negative_cosines).logsumexp(dim=1))
    return scores


def negative_words(words: Tensor, labels: Tensor) -> Tensor:
    """Return the places [M] of the words that are farthest from all labels (Jiang et al. 2024, §3.1).

    A word is near if its cosine with some labels is high: it is judged by the 95th percentile of its cosines, and the
    15 % with the lowest ones are taken, at least one.

    Args:
        words: [W, D] unit features of a lexicon.
        labels: [C, D] unit features.
    """
    nearness = similarity(words, labels).kthvalue(math.ceil(NEAR_QUANTILE * len(labels)), dim=1).values
    return nearness.argsort(stable=True)[: max(1, round(NEGATIVE_SHARE * len(words)))]
