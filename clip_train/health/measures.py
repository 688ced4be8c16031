"""What is measured of a batch when a row is logged: the inputs of the loss doctor (health/doctor.py).

Features of the first rows of this rank are looked at, captions and pictures of all ranks; all of it when the trainer
waits for the device anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clip_train.distributed.collectives import all_gather
from clip_train.distributed.shards import own_part
from clip_train.evaluation.collapse import FEWEST_FOR_RANK, effective_rank, mean_pairwise_cosine
from clip_train.loss.captions import caption_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clip_train.distributed.world import World
    from clip_train.types import Batch

ROWS = 128  # whose features are looked at
_PIXELS = 1024  # of a picture, by which equal ones are found
_TENSORS, _ELEMENTS = 8, 4096  # by which the size of an update is estimated


def feature_measures(image: Tensor, text: Tensor) -> dict[str, float]:
    """Return what the features [B, D] of true pairs, of unit length, look like; nothing for too few rows.

    `mean_cosine` and `effective_rank` of each tower; `modality_gap`, the distance of the two centroids; `best_cosine`,
    of a picture with the caption of the batch that fits it best, on average; and `pair_margin`, by how many standard
    errors true pairs are more alike than others.
    """
    rows = min(len(image), ROWS)
    if rows < FEWEST_FOR_RANK:
        return {}
    both = torch.stack([image[:rows].float(), text[:rows].float()]).cpu().double()  # [2, rows, D]
    if not bool(both.isfinite().all()):
        return {}
    measures: dict[str, float] = {}
    for tower, features in zip(("image", "text"), both, strict=True):
        measures[f"health/{tower}_mean_cosine"] = mean_pairwise_cosine(features.sum(0), num_rows=rows)
        measures[f"health/{tower}_effective_rank"] = effective_rank(features @ features.T)
    cosines = both[0] @ both[1].T  # [rows, rows]
    own = cosines.diagonal()
    others = (cosines.sum(1) - own) / (rows - 1)  # of each picture with the captions of others
    margin = own - others
    error = margin.std() / rows**0.5
    return measures | {
        "health/modality_gap": float((both[0].mean(0) - both[1].mean(0)).norm()),
        "health/best_cosine": float(cosines.amax(1).mean()),
        "health/pair_margin": float(margin.mean() / error.clamp(min=1e-9)),
    }


def batch_measures(batch: Batch, *, empty_length: int, world: World) -> dict[str, float]:
    """Return which shares of the pairs of all ranks have a caption or picture that is not theirs alone or says nothing.

    empty_length: tokens of an empty caption. Pictures count as equal if their pixels are: augmentation hides copies.
    Every rank calls it.
    """
    context_length = batch.tokens.shape[1]
    lengths = batch.lengths.to(world.device)
    pixels = batch.images.flatten(1)
    pixels = pixels[:, :: max(1, pixels.shape[1] // _PIXELS)]
    if pixels.is_floating_point():  # cached features
        pixels = pixels.float().view(torch.int32)
    facts = [
        caption_ids(batch.tokens), caption_ids(pixels), lengths <= empty_length, lengths >= context_length, batch.valid,
    ]  # fmt: skip
    own = torch.stack([fact.long() for fact in facts], dim=1)  # [B, 5]
    captions, pictures, empty, cut, valid = all_gather(own, world=world).cpu().unbind(1)  # [G] each
    used = valid.bool()
    return {
        "health/duplicate_captions": _share_of_duplicates(captions[used & ~empty.bool()]),
        "health/duplicate_images": _share_of_duplicates(pictures[used]),
        "health/empty_captions": float(empty[used].double().mean()),
        "health/truncated_captions": float(cut[used].double().mean()),
    }


class UpdateRatio:
    """By how much of its size one step changes the weights, estimated from a few thousand of them."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and own_part(p).numel()]
        self._parameters = sorted(matrices, key=lambda p: -p.numel())[:_TENSORS]
        self._before: Tensor | None = None
        self._ratio: Tensor | None = None

    @torch.no_grad()
    def after_step(self, *, logged: bool) -> None:
        """Follow a step; the one after a logged one is measured."""
        if self._before is not None:
            change = (self._sample() - self._before).norm()
            self._ratio = change / self._before.norm().clamp(min=1e-30)
            self._before = None
        if logged and self._parameters:
            self._before = self._sample()

    def take(self) -> dict[str, float]:
        """Return the newest ratio, if one was measured since the last call. It waits for the device."""
        ratio, self._ratio = self._ratio, None
        return {} if ratio is None else {"health/update_ratio": float(ratio)}

    def _sample(self) -> Tensor:
        parts = [own_part(p).detach().reshape(-1)[:_ELEMENTS].float() for p in self._parameters]
        return torch.cat(parts)


def _share_of_duplicates(ids: Tensor) -> float:
    """Return the share of ids [n] that occur more than once."""
    if not len(ids):
        return 0.0
    counts = ids.unique(return_counts=True)[1]
    return float(counts[counts > 1].sum() / len(ids))
