"""Linear and few-shot probes on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.distributed.collectives import all_reduce
from clip_train.errors import UserError
from clip_train.evaluation.classify.scores import NUM_TOP, score
from clip_train.evaluation.collapse import TowerStatistics
from clip_train.evaluation.confidence import bootstrap, bootstrap_ratio
from clip_train.evaluation.draw import draw_shots, held_out
from clip_train.evaluation.evaluator import Evaluator, Setting
from clip_train.evaluation.features import DualEncoder, gather_items, to_numpy
from clip_train.evaluation.interruptible import asker_of
from clip_train.evaluation.probe.average_precision import eleven_point, rank
from clip_train.evaluation.probe.logistic_regression import MAX_ITERATIONS, Rows, Solution, fit, search_c
from clip_train.evaluation.result import EvaluationResult, item_keys

if TYPE_CHECKING:
    from clip_train.evaluation.classify.labelled_images import LabelledImages

SEEDS = (0, 1, 2)
SEVERAL = "mean_average_precision_11"  # the metric where an image may have several classes
ONE = ["acc1", "mean_per_class_recall"]  # the metrics where it has one
SHARE_TO_CHOOSE = 0.2  # of the training images, for C
SEARCH_ITERATIONS = 100  # a fit of the search need not be finished: it starts from the last one
MOST_SHOTS_TO_CHOOSE = 4  # held-out images per class that choose C of a few-shot probe, as in CoOp (Zhou et al. 2022)


class Encoded(NamedTuple):
    """This rank's images of a set."""

    rows: Rows
    places: Tensor  # [n] int64 on the CPU, in the set
    collapsed: str | None  # why the features of all ranks are worth no score

    def among(self, chosen: np.ndarray) -> Rows:
        """Return this rank's rows of a choice [N] bool of the whole set."""
        return self.rows.among(torch.from_numpy(chosen)[self.places].to(self.rows.features.device))


class Probe(Evaluator):
    """Accuracy of logistic regressions on frozen features: with all labels, and with a few per class.

    C is chosen on a fifth of the training images; the classifier of all labels is then fitted to all of them. An image
    may belong to several classes: then the metric is VOC's mean average precision.

    Args:
        train: to learn from, the same on every rank.
        test: to be scored on; the same classes.
        features: `pooled` or `projected`.
        shots: images per class of the few-shot probes.
        setting: what it works with.
    """

    def __init__(
        self, train: LabelledImages, test: LabelledImages, *, features: str, shots: Sequence[int], setting: Setting
    ) -> None:
        super().__init__(setting)
        self.train, self.test = train, test
        self._features, self._shots = features, shots
        self._num_classes = len(train.classnames)
        if train.multilabel != test.multilabel:
            raise UserError("a probe needs one class per image in both parts, or several in both")

    def metric_names(self) -> list[str]:
        """Return those of all labels, and one for each number of shots."""
        several = self.test.multilabel
        of_all = [SEVERAL] if several else ONE
        few = SEVERAL if several else ONE[0]
        return [*(f"linear_{name}" for name in of_all), *(f"{shots}_shot_{few}" for shots in self._shots)]

    def measure(self, model: DualEncoder) -> EvaluationResult:
        """Return metrics, chance, intervals and the likeliest classes of every test image."""
        train, test = (self._encode(model, images) for images in (self.train, self.test))
        with torch.autocast(self.world.device.type, enabled=False):
            choosing = held_out(self.train.labels, share=SHARE_TO_CHOOSE)
            fitted = partial(fit, num_classes=self._num_classes, world=self.world, before_each=asker_of(model))
            c, scores = self._choose_c(fitted, train.among(~choosing), train.among(choosing))
            solution = fitted(train.rows, c=c)
            logits = self._test_logits(solution, test)
            result = self._score_several(logits) if self.test.multilabel else self._score_one(logits)
            result.details |= {
                "features": self._features, "train_images": len(self.train.labels), "c": c, "c_tried": scores,
                "iterations": solution.iterations,
            }  # fmt: skip
            if solution.iterations >= MAX_ITERATIONS:
                result.warnings.append(f"the fit stopped at {MAX_ITERATIONS} iterations, before it had converged")
            for shots in self._shots:
                self._few_shots(result, fitted, train, test, shots=shots, choosing=choosing)
        result.notes.append(
            f"features: {self._features}; C = {c:.3g} from a fifth of {len(self.train.labels):,} training images. "
            "Not comparable with clip-benchmark's probe, which is trained with AdamW on unit features"
        )
        result.collapsed = train.collapsed or test.collapsed
        return result

    def _encode(self, model: DualEncoder, images: LabelledImages) -> Encoded:
        """Return this rank's features; the ranks together have seen every image once."""
        features, places, valids = [], [], []
        for batch in self.setting.read(images.source)():
            pixels = batch.images.to(self.world.device, non_blocking=True)
            pooled = self._features == "pooled"
            features.append(model.pool_image(pixels) if pooled else model.encode_image(pixels, normalize=False))
            places.append(batch.indices)
            valids.append(batch.valid)
        valid, place = torch.cat(valids), torch.cat(places)
        device = self.world.device
        gather_items(place.to(device), {}, valid=valid.to(device), num_items=len(images.labels), world=self.world)
        # L-BFGS on single precision ends early; the CPU has double at half the speed, GPUs at far less.
        own = torch.cat(features)[valid.to(device)].to(torch.float64 if device.type == "cpu" else torch.float32)
        statistics = TowerStatistics(embed_dim=own.shape[1], world=self.world)
        statistics.add(F.normalize(own, dim=1), numbers=place[valid].to(device))
        statistics.reduce()
        targets = torch.from_numpy(images.labels)[place[valid]].to(device)
        return Encoded(Rows(own, targets), place[valid], statistics.reason("image"))

    def _choose_c(
        self, fitted: Callable[..., Solution], rows: Rows, choosing: Rows
    ) -> tuple[float, dict[float, float]]:
        newest: Solution | None = None

        def accuracy(c: float) -> float:
            nonlocal newest
            newest = fitted(rows, c=c, start=newest, max_iterations=SEARCH_ITERATIONS)
            return self._accuracy(newest, choosing)

        return search_c(accuracy)

    def _accuracy(self, solution: Solution, rows: Rows) -> float:
        """Return the share of right answers over all ranks, the same on each."""
        logits = solution.logits(rows.features)
        if rows.targets.ndim == 1:
            hits = logits.argmax(dim=1) == rows.targets
        else:
            hits = ((logits > 0) == rows.targets).flatten()
        counts = torch.stack([hits.sum(), hits.new_tensor(hits.numel(), dtype=torch.int64)])
        right, total = all_reduce(counts, world=self.world).tolist()
        return right / max(total, 1)

    def _test_logits(self, solution: Solution, test: Encoded) -> Tensor:
        """Return the logits [N, C] of all test images, in order, on every rank."""
        logits = solution.logits(test.rows.features)
        most = int(all_reduce(torch.tensor(len(logits), device=logits.device), op="max", world=self.world))
        padding = most - len(logits)
        place = F.pad(test.places.to(logits.device), (0, padding))
        valid = torch.arange(most, device=logits.device) < len(logits)
        columns = {"logits": F.pad(logits, (0, 0, 0, padding))}
        return gather_items(place, columns, valid=valid, num_items=len(self.test.labels), world=self.world)["logits"]

    def _score_one(self, logits: Tensor) -> EvaluationResult:
        top = to_numpy(logits.sort(dim=1, descending=True, stable=True)[1][:, :NUM_TOP])
        of_all = score(self.test.labels, top, num_classes=self._num_classes, classnames=self.test.classnames)
        return EvaluationResult(
            task="linear_probe",
            num_items=of_all.num_items,
            metrics={f"linear_{name}": of_all.metrics[name] for name in ONE},
            chance={f"linear_{name}": of_all.chance[name] for name in ONE},
            intervals={f"linear_{name}": of_all.intervals[name] for name in ONE},
            warnings=of_all.warnings,
            details=of_all.details,
            per_class=of_all.per_class,
            predictions={"top": top, "label": self.test.labels, "key": item_keys(self.test.source)},
        )

    def _score_several(self, logits: Tensor) -> EvaluationResult:
        labels, scores = self.test.labels, to_numpy(logits)
        once, ranked = np.ones(len(labels), dtype=np.int64), rank(labels, scores)
        name = f"linear_{SEVERAL}"
        return EvaluationResult(
            task="linear_probe",
            num_items=len(labels),
            metrics={name: eleven_point(ranked, once)},
            chance={name: float(labels.mean())},
            intervals={name: bootstrap(lambda drawn: eleven_point(ranked, drawn), counts=once)},
            predictions={"logits": scores.astype(np.float32), "label": labels},
        )

    def _few_shots(
        self,
        result: EvaluationResult,
        fitted: Callable[..., Solution],
        train: Encoded,
        test: Encoded,
        *,
        shots: int,
        choosing: np.ndarray,
    ) -> None:
        """Add the mean score of a few-shot probe over the draws; its interval resamples the test images."""
        logits, chosen = [], []
        for seed in SEEDS:
            few = train.among(draw_shots(self.train.labels, among=~choosing, shots=shots, seed=seed))
            to_choose = draw_shots(
                self.train.labels, among=choosing, shots=min(shots, MOST_SHOTS_TO_CHOOSE), seed=seed
            )  # fmt: skip
            c, _ = self._choose_c(fitted, few, train.among(to_choose))
            solution = fitted(few, c=c)
            logits.append(to_numpy(self._test_logits(solution, test)))
            chosen.append(c)
        labels, metric = self.test.labels, SEVERAL if self.test.multilabel else ONE[0]
        name, once = f"{shots}_shot_{metric}", np.ones(len(labels), dtype=np.int64)
        if self.test.multilabel:
            ranked = [rank(labels, of_draw) for of_draw in logits]
            scores = [eleven_point(one, once) for one in ranked]
            interval = bootstrap(lambda drawn: float(np.mean([eleven_point(r, drawn) for r in ranked])), counts=once)
        else:
            hits = np.stack([of_draw.argmax(axis=1) == labels for of_draw in logits])  # [draws, N]
            scores = hits.mean(axis=1).tolist()
            interval = bootstrap_ratio(hits.sum(axis=0), len(SEEDS) * once)
            result.predictions[f"{shots}_shot_hits"] = hits.sum(axis=0)
        result.metrics[name], result.intervals[name] = float(np.mean(scores)), interval
        result.chance[name] = float(labels.mean()) if self.test.multilabel else 1 / self._num_classes
        result.details.setdefault("few_shot", {})[shots] = {metric: scores, "c": chosen, "seeds": list(SEEDS)}
