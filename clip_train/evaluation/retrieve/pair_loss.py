"""The loss of held-out pairs, over the whole set as one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.distributed.collectives import all_reduce
from clip_train.evaluation.features import similarity

if TYPE_CHECKING:
    from clip_train.distributed.world import World


def loss_of_all_pairs(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: float,
    logit_bias: float | None,
    world: World,
    chunk_elements: int,
) -> float:
    """Return the mean loss of N pairs, each against all others: a mean over batches would depend on their size.

    With a bias it is the sigmoid loss, else the symmetric cross-entropy. Equal captions of other pairs are negatives.

    Args:
        image_features: [N, D] unit length.
        text_features: [N, D] unit length, row by row the other half of each pair.
        logit_scale: the factor that turns cosines into logits.
        logit_bias: added to the logits of a model that was trained with the sigmoid loss.
        world: the ranks, which share the rows.
        chunk_elements: most logits held at once.
    """
    num_pairs = len(image_features)
    per_rank = -(-num_pairs // world.size)
    own = torch.arange(num_pairs, device=image_features.device)[world.rank * per_rank : (world.rank + 1) * per_rank]
    total = torch.zeros((), dtype=torch.float64, device=image_features.device)
    for rows in own.split(max(1, chunk_elements // num_pairs)):
        place = (torch.arange(len(rows), device=rows.device), rows)  # of each row's own pair
        if logit_bias is not None:
            logits = logit_scale * similarity(image_features[rows], text_features) + logit_bias
            logits[place] *= -1
            total += F.softplus(logits).double().sum()
            continue
        for queries, gallery in ((image_features, text_features), (text_features, image_features)):
            logits = logit_scale * similarity(queries[rows], gallery)
            total += (logits.logsumexp(dim=1) - logits[place]).double().sum() / 2
    return float(all_reduce(total, world=world)) / num_pairs
