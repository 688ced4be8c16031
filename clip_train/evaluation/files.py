"""The files of one round of evaluations: FOLDER/NAME.json and .npz, FOLDER/samples/NAME.json and .npz."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clip_train.evaluation.classify import Classify
from clip_train.evaluation.result import EvaluationResult, write_result
from clip_train.evaluation.retrieve import Retrieve
from clip_train.evaluation.samples import collect, save_samples


def write_results(
    results: Mapping[str, EvaluationResult],
    folder: Path,
    *,
    evaluators: Mapping[str, Classify | Retrieve],
    model: str,
    pretrained: str,
) -> None:
    """Write scores, predictions and the report's pictures of every evaluation. Only one rank calls this.

    Args:
        results: by name of the evaluation.
        folder: e.g. `RUN/evaluation/00001000`.
        evaluators: what made the results, by the same names.
        model: name of the model.
        pretrained: which weights, e.g. `RUN step 1000`.
    """
    for name, result in results.items():
        write_result(result, folder / f"{name}.json", dataset=name, model=model, pretrained=pretrained)
        save_samples(collect(evaluators[name], result), folder / "samples" / f"{name}.json")
