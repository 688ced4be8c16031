"""Image-to-text and text-to-image recall on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.confidence import bootstrap_mean_recall, bootstrap_ratio
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    EncodedTexts,
    TokenizedTexts,
    encode_all_images,
    encode_texts,
    similarity,
    to_numpy,
    tokenize_texts,
)
from clip_train.evaluation.result import EvaluationResult, evenly_spaced, item_keys
from clip_train.evaluation.retrieve.pair_loss import loss_of_all_pairs
from clip_train.evaluation.retrieve.ranking import Ranks, Side, chance_of_recall, pad_ids, rank_right_answers
from clip_train.evaluation.samples import NUM_PICTURES, PictureAnswers, ReportSamples, read_pictures
from clip_train.loss.config import ClipLossConfig, SigLipLossConfig

if TYPE_CHECKING:
    from clip_train.evaluation.retrieve.captioned_images import CaptionedImages

CHUNK_ELEMENTS = 2**24  # similarities held at once: 64 MiB
NUM_TOP = 5  # nearest captions kept for the pictures of the report
NUM_PAIRS = 16  # rows of the report's similarity matrix
RSUM = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)}


class Retrieve(Evaluator):
    """Recall@k both ways on pictures with one or more captions each.

    `image_retrieval_recall@k` searches images by caption, `text_retrieval_recall@k` captions by image (a hit if any of
    the image's captions is found), as in clip-benchmark. A tie with a wrong answer counts half a place.
    Where each picture has one caption there is also the loss of all pairs.

    Args:
        images: the captioned set, the same on every rank.
        setting: what it works with.
        recall_k: the k of recall@k.
        chunk_elements: most similarities held at once on a device.
    """

    def __init__(
        self,
        images: CaptionedImages,
        *,
        setting: Setting,
        recall_k: Sequence[int] = (1, 5, 10),
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        super().__init__(setting)
        self.images = images
        self._recall_k = sorted(set(recall_k))
        self._chunk_elements = chunk_elements

    @property
    def has_loss(self) -> bool:
        """Whether each picture has one caption, as every picture has at least one."""
        return len(self.images.captions) == len(self.images.source)

    def metric_names(self) -> list[str]:
        """Return recalls in both directions, the lenient ones too if pictures share captions."""
        within = [k for k in self._recall_k if k <= len(self.images.source)]
        names = [f"{side}_retrieval_recall@{k}" for k in within for side in ("image", "text")]
        names += ["mean_recall@1"] if 1 in within else []
        return [*names, *(f"lenient_{name}" for name in names if self._has_shared_captions)]

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals, ranks and a few pictures' nearest captions."""
        texts = encode_texts(model, self._texts, world=self.world)
        image_features = encode_all_images(
            model, self.setting.read(self.images.source), num_images=len(self.images.source), world=self.world
        )
        image_ranks, text_ranks = self._search(image_features, texts)
        result = score(image_ranks, text_ranks, owner=self.images.owner, recall_k=self._recall_k)
        if self._has_shared_captions:
            lenient = score(
                *self._search(image_features, texts, lenient=True), owner=self.images.owner, recall_k=self._recall_k
            )
            _add_lenient(result, lenient)
        if self.has_loss:
            self._add_loss(result, model, image_features, texts.features[texts.rows])
        result.predictions |= self._nearest(image_features, texts)
        result.predictions |= {"key": item_keys(self.images.source), "owner": self.images.owner}
        result.collapsed = collapsed_tower(image=image_features, text=texts.features)
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples:
        """Return a few pictures with their nearest captions, and the similarities of a few pairs."""
        images, found = self.images, result.predictions
        answers = []
        for picture, top, cosines in zip(found["picture"], found["picture_top"], found["picture_cosine"], strict=True):
            first, last = np.searchsorted(images.owner, [picture, picture + 1])
            truth = list(images.captions[first:last])
            nearest = [images.captions[t] for t in top]
            # Another picture with the very same caption is no mistake that a reader could see.
            answers.append(
                PictureAnswers(
                    truth=truth,
                    answers=nearest,
                    cosines=[round(float(c), 4) for c in cosines],
                    right=nearest[0] in truth,
                )
            )
        return ReportSamples(
            pictures=read_pictures(images.source, found["picture"], size=size),
            answers=answers,
            pair_pictures=read_pictures(images.source, found["pair_image"], size=size),
            pair_captions=[images.captions[t] for t in found["pair_caption"]],
            pair_cosines=found["pair_cosine"],
        )

    def _add_loss(
        self, result: EvaluationResult, model: DualEncoder, image_features: Tensor, text_features: Tensor
    ) -> None:
        bias = model.logit_bias
        result.loss = loss_of_all_pairs(
            image_features, text_features, logit_scale=float(model.logit_scale.exp()),
            logit_bias=None if bias is None else float(bias), world=self.world, chunk_elements=self._chunk_elements,
        )  # fmt: skip
        trained_with = ClipLossConfig() if bias is None else SigLipLossConfig()
        guessing = trained_with.loss_of_guessing(result.num_items)
        result.notes.append(
            f"loss {result.loss:.4f} over all {result.num_items:,} pairs as one batch (guessing {guessing:.3f})"
        )

    @cached_property
    def _texts(self) -> TokenizedTexts:
        return tokenize_texts(self.setting.tokenizer, self.images.captions)

    @property
    def _has_shared_captions(self) -> bool:
        return len(self._texts.tokens) < len(self._texts.rows)

    def _search(self, image_features: Tensor, texts: EncodedTexts, *, lenient: bool = False) -> tuple[Ranks, Ranks]:
        """Return the ranks of images by caption and of captions by image.

        Right is an image with its own captions; lenient, also another image that has the very same caption.
        """
        device = image_features.device
        image_index = torch.arange(len(image_features), device=device)
        if lenient:
            text_ids = texts.rows[:, None]
            ids_per_image: list[list[int]] = [[] for _ in range(len(image_features))]
            for text_id, image in zip(texts.rows.tolist(), self.images.owner.tolist(), strict=True):
                ids_per_image[image].append(text_id)
            image_ids = pad_ids(ids_per_image).to(device)
        else:
            text_ids = torch.from_numpy(self.images.owner).to(device)[:, None]
            image_ids = image_index[:, None]
        image_side = Side(image_features, image_index, image_ids)
        text_side = Side(texts.features, texts.rows, text_ids)
        image_ranks = rank_right_answers(
            text_side, image_side, world=self.world, chunk_elements=self._chunk_elements
        )  # fmt: skip
        text_ranks = rank_right_answers(
            image_side, text_side, world=self.world, chunk_elements=self._chunk_elements
        )  # fmt: skip
        return image_ranks, text_ranks

    def _nearest(self, image_features: Tensor, texts: EncodedTexts) -> dict[str, np.ndarray]:
        """Return nearest captions of a few pictures, and the similarities of a few pairs, for the report."""
        num_images = len(image_features)
        first_caption = np.unique(self.images.owner, return_index=True)[1]  # [N]
        pictures = evenly_spaced(num_images, count=NUM_PICTURES)
        cosine, nearest = similarity(image_features[pictures], texts.features).sort(dim=1, descending=True, stable=True)
        caption_of_text = np.unique(to_numpy(texts.rows), return_index=True)[1]  # [U]
        distinct = np.unique(to_numpy(texts.rows)[first_caption], return_index=True)[1]
        pairs = np.sort(distinct)[evenly_spaced(len(distinct), count=NUM_PAIRS)]
        pair_texts = texts.features[texts.rows[first_caption[pairs]]]
        return {
            "picture": pictures,
            "picture_top": caption_of_text[to_numpy(nearest[:, :NUM_TOP])],
            "picture_cosine": to_numpy(cosine[:, :NUM_TOP]),
            "pair_image": pairs,
            "pair_caption": first_caption[pairs],
            "pair_cosine": to_numpy(similarity(image_features[pairs], pair_texts)),
        }


def score(image_ranks: Ranks, text_ranks: Ranks, *, owner: np.ndarray, recall_k: Sequence[int]) -> EvaluationResult:
    """Turn ranks into recalls by integer counts.

    Args:
        image_ranks: of the right image, for each of T captions.
        text_ranks: of the best right caption, for each of N images.
        owner: [T] the image of each caption.
        recall_k: the k of recall@k; one above the size of the gallery is left out with a warning.
    """
    num_images, num_texts = len(text_ranks.twice_rank), len(owner)
    captions = np.bincount(owner, minlength=num_images)  # [N]
    metrics, chance, intervals, warnings = {}, {}, {}, []
    for k in recall_k:
        if k > num_images:
            warnings.append(f"recall@{k} is left out: the set has only {num_images} images")
            continue
        found = image_ranks.twice_rank <= 2 * k
        name = f"image_retrieval_recall@{k}"
        metrics[name] = int(found.sum()) / num_texts
        chance[name] = chance_of_recall(image_ranks.num_right, num_gallery=num_images, k=k)
        intervals[name] = bootstrap_ratio(np.bincount(owner[found], minlength=num_images), captions)
        found = text_ranks.twice_rank <= 2 * k
        name = f"text_retrieval_recall@{k}"
        metrics[name] = int(found.sum()) / num_images
        chance[name] = chance_of_recall(text_ranks.num_right, num_gallery=num_texts, k=k)
        intervals[name] = bootstrap_ratio(found.astype(np.int64), np.ones(num_images, dtype=np.int64))
    if "image_retrieval_recall@1" in metrics:
        for values in (metrics, chance):
            values["mean_recall@1"] = (values["image_retrieval_recall@1"] + values["text_retrieval_recall@1"]) / 2
        by_caption = np.bincount(owner[image_ranks.twice_rank <= 2], minlength=num_images)
        intervals["mean_recall@1"] = bootstrap_mean_recall(by_caption, captions, text_ranks.twice_rank <= 2)
    return EvaluationResult(
        task="zeroshot_retrieval",
        num_items=num_images,
        metrics=metrics,
        chance=chance,
        intervals=intervals,
        warnings=warnings,
        details={
            "captions": num_texts,
            "image_retrieval_median_rank": float(np.median(image_ranks.twice_rank)) / 2,
            "text_retrieval_median_rank": float(np.median(text_ranks.twice_rank)) / 2,
            "image_retrieval_mean_rank": float(np.mean(image_ranks.twice_rank)) / 2,
            "text_retrieval_mean_rank": float(np.mean(text_ranks.twice_rank)) / 2,
            "rsum": 100 * sum(metrics[name] for name in RSUM) if metrics.keys() >= RSUM else None,
            "image_retrieval_tied": float(image_ranks.tied.mean()),
            "text_retrieval_tied": float(text_ranks.tied.mean()),
        },
        predictions={
            "image_twice_rank": image_ranks.twice_rank,
            "text_twice_rank": text_ranks.twice_rank,
            "image_num_right": image_ranks.num_right,
        },
    )


def _add_lenient(strict: EvaluationResult, lenient: EvaluationResult) -> None:
    shared = int((lenient.predictions["image_num_right"] > 1).sum())
    strict.warnings.append(
        f"{shared} of {strict.details['captions']} captions belong to several pictures, which makes strict recalls low "
        "for any model; lenient ones take every picture with the caption as right"
    )
    strict.metrics |= {f"lenient_{name}": value for name, value in lenient.metrics.items()}
    strict.chance |= {f"lenient_{name}": value for name, value in lenient.chance.items()}
    strict.intervals |= {f"lenient_{name}": interval for name, interval in lenient.intervals.items()}
    strict.predictions |= {f"lenient_{name}": ranks for name, ranks in lenient.predictions.items()}
