"""Choices between captions or pictures on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from clip_train.evaluation.choose.choices import Choice, ChoiceSet, Kind
from clip_train.evaluation.choose.score import METRICS, score
from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import (
    DualEncoder,
    EncodedTexts,
    TokenizedTexts,
    encode_all_images,
    encode_texts,
    to_numpy,
    tokenize_texts,
)
from clip_train.evaluation.result import EvaluationResult, evenly_spaced, item_keys
from clip_train.evaluation.samples import NUM_PICTURES, PictureAnswers, ReportSamples, read_pictures

PAIRS_AT_ONCE = 2**14  # of features that are multiplied: 32 MiB of float32 at 512 dimensions


class Choose(Evaluator):
    """Accuracy of choosing between a few captions or pictures.

    `text_acc`, `image_acc` and `acc` are clip-benchmark's names; for two pictures with two captions they are
    Winoground's text, image and group score. A right answer must be strictly nearer than every wrong one.

    Args:
        choices: the items, the same on every rank.
        setting: what it works with.
    """

    def __init__(self, choices: ChoiceSet, *, setting: Setting) -> None:
        super().__init__(setting)
        self.choices = choices

    def metric_names(self) -> list[str]:
        """Return those of the kind of its items."""
        return list(METRICS[self.choices.items[0].kind])

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and every cosine that was compared."""
        source = self.choices.source
        texts = encode_texts(model, self._texts, world=self.world)
        images = encode_all_images(model, self.setting.read(source), num_images=len(source), world=self.world)
        result = score(self.choices.items, compare(self.choices.items, images=images, texts=texts))
        first = [item.pictures[0] for item in self.choices.items]
        result.predictions |= {"key": np.array(self.choices.keys), "image_key": item_keys(source)[first]}
        result.warnings += self.choices.warnings
        result.collapsed = collapsed_tower(image=images, text=texts.features)
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples | None:
        """Return the first picture of evenly spaced items with its captions, the nearest first."""
        if self.choices.items[0].kind is Kind.pictures:
            return None
        found = result.predictions
        starts = np.concatenate([[0], (found["num_pictures"] * found["num_captions"]).cumsum()])
        chosen = evenly_spaced(result.num_items, count=NUM_PICTURES)
        answers = [
            first_picture_answers(self.choices.items[i], found["cosine"][starts[i] :], right=bool(found["text_acc"][i]))
            for i in chosen
        ]
        pictures = np.array([self.choices.items[i].pictures[0] for i in chosen])
        return ReportSamples(pictures=read_pictures(self.choices.source, pictures, size=size), answers=answers)

    @cached_property
    def _texts(self) -> TokenizedTexts:
        captions = [caption for item in self.choices.items for caption in item.captions]
        return tokenize_texts(self.setting.tokenizer, captions)


def compare(items: Sequence[Choice], *, images: Tensor, texts: EncodedTexts) -> list[np.ndarray]:
    """Return the cosines [pictures, captions] float32 of every item.

    Args:
        items: N of them.
        images: [P, D] unit features of the source's pictures.
        texts: of all captions, item after item.
    """
    picture, caption, start = [], [], 0
    for item in items:
        picture += [p for p in item.pictures for _ in item.captions]
        caption += [start + c for _ in item.pictures for c in range(len(item.captions))]
        start += len(item.captions)
    rows = texts.rows[torch.tensor(caption, device=texts.rows.device)]
    places = torch.tensor(picture, device=rows.device)
    # Row by row and not as a matrix: equal features have equal cosines, wherever they stand.
    cosine = torch.cat(
        [
            (images[p] * texts.features[t]).sum(dim=1)
            for p, t in zip(places.split(PAIRS_AT_ONCE), rows.split(PAIRS_AT_ONCE), strict=True)
        ]
    )
    sizes = [(len(item.pictures), len(item.captions)) for item in items]
    ends = np.cumsum([p * c for p, c in sizes])[:-1]
    return [part.reshape(size) for part, size in zip(np.split(to_numpy(cosine), ends), sizes, strict=True)]


def first_picture_answers(item: Choice, cosines: np.ndarray, *, right: bool) -> PictureAnswers:
    """Return the captions of an item in order of their cosines with its first picture, for the report.

    Args:
        item: not of `Kind.pictures`.
        cosines: of its pairs, the first picture's first.
        right: the model's answer is right.
    """
    nearest = np.argsort(-cosines[: len(item.captions)], kind="stable")
    return PictureAnswers(
        truth=[item.captions[caption] for picture, caption in sorted(item.right) if picture == 0],
        answers=[item.captions[c] for c in nearest],
        cosines=[round(float(cosines[c]), 4) for c in nearest],
        right=right,
    )
