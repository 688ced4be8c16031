"""Evaluate a model here and, exported, with public tools, on the same generated sets; every score must be equal.

The tools are clip-benchmark and, for ImageNet, also open_clip's own evaluation during training.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_train.distributed.world import World
from clip_train.errors import ClipTrainError, UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.config import EvaluationConfig, Precision
from clip_train.evaluation.features import evaluating
from clip_train.evaluation.result import read_result, write_result
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.interop.export.refuse import refusals
from clip_train.interop.export.targets import Part, Target
from clip_train.interop.export.verify import find_libraries, isolated_environment
from clip_train.interop.export.write import write_parts
from clip_train.interop.load import assemble, read_source
from clip_train.tools.reference.sets import write_fake_imagenet, write_sets

if TYPE_CHECKING:
    from clip_train.interop.loaded_model import LoadedModel
    from clip_train.schema import EvaluateConfig

MAX_DIFFERENCE = 1e-6
TIMEOUT_SECONDS = 7200
TOOLS = {"clip_benchmark": "clip-benchmark", "open_clip": "open_clip"}
RECALL_K = (1, 5, 10)
# One process for all: the library takes longer to import than to evaluate a small set.
_PROGRAM = """
import json, sys
from clip_benchmark.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["clip_benchmark", *arguments]
    main()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one set."""

    tool: str
    dataset: str
    metric: str
    ours: float | None
    reference: float | None

    @property
    def difference(self) -> float:
        """Absolute; infinite if one tool has no value where the other has one."""
        if self.ours is None or self.reference is None:
            return 0.0 if self.ours is self.reference else math.inf
        return abs(self.ours - self.reference)


def check_reference(config: EvaluateConfig) -> int:
    """Compare as `config.reference` says, print ours, the reference and the difference; return 1 if any differs.

    Raises:
        UserError: the Python has no clip-benchmark, or the model cannot be exported for it.
    """
    assert config.reference.python is not None
    python = Path(config.reference.python)
    if Target.clip_benchmark not in find_libraries([python]):
        raise UserError(f"reference.python={python} has no clip-benchmark: pip install clip-benchmark==1.6.2 requests")
    found = read_source(config.checkpoint)
    model = assemble(found)
    reasons = refusals(found.config, found.tensors, tokenizer=found.tokenizer, drop_logit_bias=False)
    if Target.open_clip in reasons:
        raise UserError(f"clip-benchmark would compute another model: {'; '.join(reasons[Target.open_clip])}")
    with ExitStack() as stack:
        work = Path(config.output or stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-train-reference-")))
        (work / "export").mkdir(parents=True)
        write_parts(
            work / "export", model=model, parts=[Part.folder], refused=reasons, published_as="reference", int8=False
        )
        evaluations: dict[str, EvaluationConfig] = {}
        for name, folder in write_sets(work).items():
            if name == "captions":
                evaluations[name] = RetrieveConfig(shards=str(folder), recall_k=list(RECALL_K))
            else:
                evaluations[name] = ClassifyConfig(root=str(folder))
        if config.reference.imagenet:
            write_fake_imagenet(work / "imagenet")
            evaluations["imagenet"] = ClassifyConfig(
                root=str(work / "imagenet"), split="val", classnames="imagenet", templates="imagenet"
            )
        _evaluate_here(model, evaluations, work=work)
        _run_clip_benchmark(python, evaluations, work=work.resolve())
        if config.reference.imagenet:
            _run_open_clip(python, work=work.resolve())
        comparisons = compare(work, names=list(evaluations))
    print(table(comparisons))
    return int(any(not row.difference <= MAX_DIFFERENCE for row in comparisons))


def compare(work: Path, *, names: Sequence[str]) -> list[Comparison]:
    """Compare every metric of the references' files, `NAME.TOOL.json`, with ours in `NAME.json`."""
    return [
        Comparison(
            tool=tool,
            dataset=name,
            metric=metric,
            ours=read_result(work / f"{name}.json")["metrics"].get(metric),
            reference=value,
        )
        for name in names
        for file, tool in TOOLS.items()
        if (path := work / f"{name}.{file}.json").exists()
        for metric, value in read_result(path)["metrics"].items()
    ]


def table(comparisons: Sequence[Comparison]) -> str:
    """Lay the comparisons out for a terminal."""

    def show(value: float | None) -> str:
        return "none" if value is None else f"{value:.6f}"

    rows = [("set", "metric", "ours", "reference", "difference", "tool")]
    rows += [(c.dataset, c.metric, show(c.ours), show(c.reference), f"{c.difference:.1e}", c.tool) for c in comparisons]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    different = sum(not row.difference <= MAX_DIFFERENCE for row in comparisons)
    verdict = f"{different} differ" if different else "all equal"
    return "\n".join([*lines, f"{len(comparisons)} scores, {verdict} (limit {MAX_DIFFERENCE:g})"])


def _evaluate_here(model: LoadedModel, evaluations: Mapping[str, EvaluationConfig], *, work: Path) -> None:
    world = World(device=torch.device("cpu"))
    for name, evaluation in evaluations.items():
        evaluation.precision = Precision.fp32
        evaluator = evaluation.build(
            world=world,
            tokenizer=model.tokenize,
            image_size=model.config.vision.image_size,
            squash=model.config.squash,
        )
        # Scores of features that count as collapsed are withheld from users, but they are still to be equal.
        with evaluating(model, world=world, precision="fp32"):
            result = evaluator.measure(model)
        write_result(result, work / f"{name}.json", dataset=name, model="export", pretrained="none")


def _run_clip_benchmark(python: Path, evaluations: Mapping[str, EvaluationConfig], *, work: Path) -> None:
    """Run clip-benchmark's own command line once for each set, and let it build its table from its files and ours."""
    runs = []
    for name, evaluation in evaluations.items():
        is_retrieval = isinstance(evaluation, RetrieveConfig)
        runs.append([
            "eval", "--model_type", "open_clip", "--model", f"local-dir:{work / 'export'}", "--pretrained", "none",
            "--batch_size", "16", "--num_workers", "0", "--no_amp", "--quiet",
            "--dataset", "imagenet1k-unverified" if name == "imagenet" else f"wds/{name}",
            "--dataset_root", str(work / name),
            "--task", "zeroshot_retrieval" if is_retrieval else "zeroshot_classification",
            "--recall_k", *map(str, RECALL_K), "--output", str(work / f"{name}.clip_benchmark.json"),
        ])  # fmt: skip
    files = [str(work / f"{name}{kind}.json") for name in evaluations for kind in ("", ".clip_benchmark")]
    runs.append(["build", *files, "--output", str(work / "benchmark.csv")])
    _run([str(python), "-c", _PROGRAM, json.dumps(runs)], tool="clip-benchmark", work=work)


def _run_open_clip(python: Path, *, work: Path) -> None:
    """Run the zero-shot evaluation of open_clip's trainer, without training, and write its scores as a result."""
    _run(
        [
            str(python), "-m", "open_clip_train.main", "--imagenet-val", str(work / "imagenet" / "val"),
            "--model", f"local-dir:{work / 'export'}", "--precision", "fp32", "--batch-size", "64", "--workers", "0",
            "--device", "cpu", "--logs", str(work / "open_clip"), "--name", "imagenet",
        ],
        tool="open_clip", work=work,
    )  # fmt: skip
    lines = (work / "open_clip" / "imagenet" / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    scores = json.loads(lines[-1])
    metrics = {f"acc{k}": scores[f"imagenet-zeroshot-val-top{k}"] for k in (1, 5)}
    (work / "imagenet.open_clip.json").write_text(json.dumps({"metrics": metrics}), encoding="utf-8")


def _run(command: list[str], *, tool: str, work: Path) -> None:
    """Run a tool to its end.

    Raises:
        ClipTrainError: it failed.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS, cwd=work,
            env=isolated_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ClipTrainError(f"{tool} gave no answer within {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ClipTrainError(f"{tool} raised: {lines[-1][:300]}")
