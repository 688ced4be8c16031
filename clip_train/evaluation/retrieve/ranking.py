"""Ranks of the right answers among all, computed in chunks and shared between ranks of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.distributed.collectives import all_gather
from clip_train.evaluation.features import similarity, to_numpy

if TYPE_CHECKING:
    from clip_train.distributed.world import World


class Side(NamedTuple):
    """Queries or gallery of a search. An answer is right if it shares an id with the query."""

    features: Tensor  # [U, D] unit length
    rows: Tensor  # [n] int64 in [0, U): items with equal content share a row, so that their similarities are equal
    ids: Tensor  # [n, M] int64, padded with -1 on one side of a search at most


class Ranks(NamedTuple):
    """Where the best right answer of each query stands."""

    twice_rank: np.ndarray  # [Q] int64, twice the rank, since a tie counts half; found among k if at most 2k
    tied: np.ndarray  # [Q] bool, a wrong answer is exactly as similar as the best right one
    num_right: np.ndarray  # [Q] int64, right answers that the gallery holds


def rank_right_answers(queries: Side, gallery: Side, *, world: World, chunk_elements: int) -> Ranks:
    """Rank each query's best right answer: 1 + wrong answers above + half the wrong answers equal.

    Every rank searches for its piece of the queries, at most `chunk_elements` similarities at a time, and holds the
    whole result.
    """
    num_queries, num_gallery = len(queries.rows), len(gallery.rows)
    per_rank = -(-num_queries // world.size)
    own = torch.arange(num_queries, device=queries.rows.device)[world.rank * per_rank : (world.rank + 1) * per_rank]
    counted = queries.rows.new_zeros(per_rank, 3)
    for piece in own.split(max(1, chunk_elements // num_gallery)):
        cosine = similarity(queries.features[queries.rows[piece]], gallery.features)  # [q, U]
        cosine = cosine[:, gallery.rows]  # [q, G]
        right = _share_an_id(queries.ids[piece], gallery.ids)
        best = cosine.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        counts = [((cosine > best) & ~right).sum(1), ((cosine == best) & ~right).sum(1), right.sum(1)]
        counted[piece - world.rank * per_rank] = torch.stack(counts, dim=1)
    above, equal, num_right = to_numpy(all_gather(counted, world=world)[:num_queries]).T
    return Ranks(2 + 2 * above + equal, equal > 0, num_right)


def pad_ids(ids_per_item: list[list[int]]) -> Tensor:
    """Return lists of ids as one [n, M] int64, padded with -1."""
    width = max(len(ids) for ids in ids_per_item)
    return torch.stack([F.pad(torch.tensor(ids), (0, width - len(ids)), value=-1) for ids in ids_per_item])


def chance_of_recall(num_right: np.ndarray, *, num_gallery: int, k: int) -> float:
    """Return the mean probability that k answers drawn without replacement hold one of each query's right ones.

    Args:
        num_right: [Q] right answers of each query.
        num_gallery: answers to draw from, at least k.
    """
    missed = np.ones(len(num_right))
    for drawn in range(k):
        missed *= np.maximum(num_gallery - num_right - drawn, 0) / (num_gallery - drawn)
    return float(1 - missed.mean())


def _share_an_id(query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Return [q, G] bool. Looped over the few ids of an item, so that no [q, G, M, M] is made."""
    shared = torch.zeros(len(query_ids), len(gallery_ids), dtype=torch.bool, device=query_ids.device)
    for query_id in query_ids.unbind(1):
        for gallery_id in gallery_ids.unbind(1):
            shared |= query_id[:, None] == gallery_id[None, :]
    return shared
