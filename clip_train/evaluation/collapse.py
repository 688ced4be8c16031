"""Detect towers that map everything to one point or one line, before their scores are believed.

Equal features make every comparison a tie, and a tie broken by index prints a plausible number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_train.distributed.collectives import all_reduce
from clip_train.distributed.world import World

MAX_MEAN_COSINE = 0.98
MIN_EFFECTIVE_RANK = 2.0
NOT_FINITE = "are not finite"
FEWEST_FOR_RANK = 8  # the effective rank of a handful of healthy features may lie below 2
# The prompts of a few classes that differ in one word may be that near in a healthy model, as "three objects" and "four
# objects" are: few features count as collapsed only if they are equal but for rounding.
FEWEST_FOR_COSINE = 16
EQUAL_COSINE = 0.99995


class TowerStatistics:
    """Sums over unit features from which mean cosine and effective rank follow, without keeping the features."""

    def __init__(self, *, embed_dim: int, world: World) -> None:
        self._world = world
        self._count = torch.zeros(2, dtype=torch.int64, device=world.device)  # rows, rows with a non-finite value
        self._first = torch.full((1,), torch.iinfo(torch.int64).max, device=world.device)  # number of a non-finite row
        self._sum = torch.zeros(embed_dim, dtype=torch.float64, device=world.device)
        self._gram = torch.zeros(embed_dim, embed_dim, dtype=torch.float64, device=world.device)

    def add(self, features: Tensor, *, numbers: Tensor | None = None) -> None:
        """Count features [n, D] of this rank, without padding rows.

        Args:
            features: of unit length.
            numbers: [n] int64, their places in the set, from 0; None if these are all of the set in order.
        """
        if numbers is None:
            numbers = torch.arange(len(features), device=features.device)
        finite = features.isfinite().all(dim=1)
        self._first = torch.cat([self._first, numbers[~finite]]).min(dim=0, keepdim=True).values
        rows = features[finite].double()
        self._count += torch.stack([finite.new_tensor(len(features), dtype=torch.int64), (~finite).sum()])
        self._sum += rows.sum(dim=0)
        self._gram += rows.T @ rows

    def reduce(self) -> None:
        """Add up the ranks. Every rank calls this once, after its last `add`."""
        for values in (self._count, self._sum, self._gram):
            all_reduce(values, world=self._world)
        all_reduce(self._first, world=self._world, op="min")

    def reason(self, tower: str) -> str | None:
        """Say why the tower counts as collapsed, or return None."""
        rows, non_finite = self._count.tolist()
        if non_finite:
            first = self._first.item() + 1
            return f"{non_finite} of {rows} {tower} features {NOT_FINITE}, the first is number {first}"
        if rows < 2:
            return None
        mean_cosine = mean_pairwise_cosine(self._sum, num_rows=rows)
        limit = MAX_MEAN_COSINE if rows >= FEWEST_FOR_COSINE else EQUAL_COSINE
        if mean_cosine > limit:
            return f"mean cosine between {tower} features is {mean_cosine:.4f} (above {limit})"
        rank = effective_rank(self._gram)
        if rows >= FEWEST_FOR_RANK and rank < MIN_EFFECTIVE_RANK:
            return f"effective rank of the {tower} features is {rank:.2f} (below {MIN_EFFECTIVE_RANK:g})"
        return None


def collapsed_tower(*, image: Tensor, text: Tensor) -> str | None:
    """Say why a tower counts as collapsed, or return None, from features [N, D] and [T, D] that every rank holds."""
    # Nothing is left to add up between ranks.
    alone = World(device=image.device)
    for tower, features in (("image", image), ("text", text)):
        statistics = TowerStatistics(embed_dim=features.shape[1], world=alone)
        statistics.add(features)
        if reason := statistics.reason(tower):
            return reason
    return None


def mean_pairwise_cosine(total: Tensor, *, num_rows: int) -> float:
    """Return the mean cosine over all pairs of different rows, from the sum [D] of the unit rows."""
    return float((total.dot(total) - num_rows) / (num_rows * (num_rows - 1)))


def effective_rank(gram: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy & Vetterli 2007) from XᵀX [D, D]."""
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum()
    return float(torch.special.entr(p).sum().exp())
