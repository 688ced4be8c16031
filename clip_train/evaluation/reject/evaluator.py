"""Known pictures against foreign ones on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from clip_train.calibration import RejectScore
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluation.collapse import TowerStatistics
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import DualEncoder, encode_images, gather_items, to_numpy
from clip_train.evaluation.prompts.classifier import (
    ClassPrompts,
    ZeroShotClassifier,
    build_classifier,
    tokenize_prompts,
)
from clip_train.evaluation.prompts.files import SINGLE_TEMPLATE
from clip_train.evaluation.reject.judge import KNOWN, MAIN_SCORE, KnownSet, Scored, judge
from clip_train.evaluation.reject.metrics import METRICS
from clip_train.evaluation.reject.scores import negative_words, reject_scores
from clip_train.evaluation.result import EvaluationResult, evenly_spaced, item_keys
from clip_train.evaluation.samples import NUM_PICTURES, PictureAnswers, ReportSamples, read_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.data.sequential import ImageSource
    from clip_train.evaluation.classify.labelled_images import LabelledImages

NUM_TOP = 5
UNKNOWN = "unknown"


class Reject(Evaluator):
    """How well pictures of known classes can be told from foreign ones by each score, and the thresholds for it.

    Args:
        known: pictures of the classes.
        foreign: sets of pictures of something else, by name; the same on every rank, as `known`.
        lexicon: words of which those far from the classes make the score `negative_labels`; empty for without.
        setting: what it works with.
        data: what to call the known set.

    Raises:
        UserError: there are fewer than two classes or known pictures, or pictures of several classes.
    """

    def __init__(
        self,
        known: LabelledImages,
        *,
        foreign: Mapping[str, ImageSource],
        lexicon: Sequence[str],
        setting: Setting,
        data: str,
    ) -> None:
        super().__init__(setting)
        if known.multilabel:
            raise UserError(f"reject needs pictures of one class each; those of {data} have any number")
        if len(set(known.classnames)) < 2 or len(known.labels) < 2:
            raise UserError(f"reject needs at least two classes and two pictures of them; {data} has fewer")
        self.known = known
        self.foreign = foreign
        self._data = data
        taken = {name.casefold() for name in known.classnames}
        self._lexicon = [word for word in lexicon if word.casefold() not in taken]

    def metric_names(self) -> list[str]:
        """Return those of the main score."""
        return list(METRICS)

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return AUROC, AUPR and FPR at 95 % TPR of the main score; among the details, all scores and thresholds."""
        classifier = build_classifier(model, self._prompts, world=self.world)
        words = self._negative_labels(model, classifier)
        embed_dim = classifier.vectors.shape[1]
        statistics = TowerStatistics(embed_dim=embed_dim, world=self.world)
        known = self._score(model, self.known.source, labels=classifier, words=words, statistics=statistics)
        statistics.reduce()
        foreign = {
            name: self._score(model, source, labels=classifier, words=words) for name, source in self.foreign.items()
        }
        classes = KnownSet(self._data, self.known.labels, self.known.classnames, self.known.templates)
        result = judge(known, foreign, of=classes)
        result.warnings += self.known.warnings
        sets = {KNOWN: self.known.source, **self.foreign}
        result.predictions |= {f"{name}_key": item_keys(source) for name, source in sets.items()}
        text_statistics = TowerStatistics(embed_dim=embed_dim, world=World(device=self.world.device))
        text_statistics.add(classifier.vectors)
        result.collapsed = statistics.reason("image") or text_statistics.reason("text")
        return result

    def samples(self, result: EvaluationResult, *, size: int) -> ReportSamples:
        """Return evenly spaced pictures of each set with their nearest classes, or `unknown` below the threshold."""
        threshold = result.details["rejection"]["thresholds"][MAIN_SCORE]
        sets: dict[str, ImageSource] = {KNOWN: self.known.source, **self.foreign}
        pictures, answers = [], []
        for name, source in sets.items():
            chosen = evenly_spaced(len(source), count=max(1, NUM_PICTURES // len(sets)))
            pictures.append(read_pictures(source, chosen, size=size))
            for i in chosen:
                truth = (
                    [self.known.classnames[self.known.labels[i]]] if name == KNOWN else [f"{name} ({UNKNOWN})", UNKNOWN]
                )
                nearest = [self.known.classnames[c] for c in result.predictions[f"{name}_top"][i]]
                cosines = [round(float(c), 4) for c in result.predictions[f"{name}_cosine"][i]]
                if cosines[0] < threshold:
                    nearest, cosines = [UNKNOWN, *nearest], [cosines[0], *cosines]
                right = nearest[0] in truth
                answers.append(PictureAnswers(truth=truth, answers=nearest, cosines=cosines, right=right))
        return ReportSamples(pictures=np.concatenate(pictures), answers=answers)

    @cached_property
    def _prompts(self) -> ClassPrompts:
        return tokenize_prompts(
            self.setting.tokenizer, classnames=self.known.classnames, templates=self.known.templates
        )  # fmt: skip

    @cached_property
    def _word_prompts(self) -> ClassPrompts:
        templates = [SINGLE_TEMPLATE] if isinstance(self.known.templates, Mapping) else self.known.templates
        return tokenize_prompts(self.setting.tokenizer, classnames=self._lexicon, templates=templates)

    def _negative_labels(self, model: DualEncoder, labels: ZeroShotClassifier) -> ZeroShotClassifier | None:
        """Return the words of the lexicon that are farthest from the labels, None without a lexicon."""
        if not self._lexicon:
            return None
        words = build_classifier(model, self._word_prompts, world=self.world)
        return words._replace(rows=negative_words(words.vectors, labels.vectors))

    def _score(
        self,
        model: DualEncoder,
        source: ImageSource,
        *,
        labels: ZeroShotClassifier,
        words: ZeroShotClassifier | None,
        statistics: TowerStatistics | None = None,
    ) -> Scored:
        """Return the scores and the nearest classes of all pictures of a source, in its order, on every rank."""
        logit_scale = float(model.logit_scale.exp())
        indices, valids = [], []
        columns: dict[str, list[Tensor]] = {}
        for features, index, valid in encode_images(model, self.setting.read(source), world=self.world):
            if statistics is not None:
                statistics.add(features[valid], numbers=index[valid])
            cosines = labels.cosines(features)
            # A stable sort breaks ties to the lower class.
            cosine, top = cosines.sort(dim=1, descending=True, stable=True)
            scores = reject_scores(
                cosines, logit_scale=logit_scale, negative_cosines=words.cosines(features) if words else None
            )
            for name, values in scores.items():
                columns.setdefault(name.value, []).append(values)
            columns.setdefault("top", []).append(top[:, :NUM_TOP])
            columns.setdefault("cosine", []).append(cosine[:, :NUM_TOP])
            indices.append(index)
            valids.append(valid)
        gathered = gather_items(
            torch.cat(indices),
            {name: torch.cat(values) for name, values in columns.items()},
            valid=torch.cat(valids),
            num_items=len(source),
            world=self.world,
        )
        arrays = {name: to_numpy(values) for name, values in gathered.items()}
        scored = {score: arrays[score.value].astype(np.float64) for score in RejectScore if score.value in arrays}
        return Scored(scored, arrays["top"], arrays["cosine"])
