"""Prove an export: each library, in a process and if need be a Python of its own, must compute what the model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from clip_train.errors import UserError
from clip_train.interop.export.archive import round_like_clip_load
from clip_train.interop.export.inputs import write_inputs
from clip_train.interop.export.targets import Target
from clip_train.interop.loaded_model import empty_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from clip_train.interop.loaded_model import LoadedModel

PEERS = Path(__file__).parent / "peers"
MAX_DIFFERENCE = 1e-5
MIN_COSINE = 0.99999
MIN_COSINE_INT8 = 0.95
TIMEOUT_SECONDS = 900
INSTALL = {
    Target.open_clip: 'pip install "clip-train[verify]"',
    Target.transformers: 'pip install "clip-train[verify]"',
    Target.sentence_transformers: 'pip install "clip-train[verify]"',
    Target.onnxruntime: 'pip install "clip-train[onnx]"',
    Target.clip_benchmark: "install clip-benchmark in an environment of its own and name it with --verify-python",
    Target.openai_clip: "install openai-clip==1.0.1 and setuptools<81 in an environment of its own and name it with "
    "--verify-python",
}


class Status(StrEnum):
    passed = "PASS"
    failed = "FAIL"
    skipped = "SKIP"
    refused = "REFUSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What came of one library."""

    target: Target
    status: Status
    version: str = ""
    max_difference: float | None = None
    """Largest difference of two unit features, the same tensors going in."""
    min_cosine: float | None = None
    file_difference: float | None = None
    """The same from files, with the library's own preprocessing and tokenizer; it is reported, not judged."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A labelled set in clip-benchmark's layout and this model's scores on it."""

    folder: Path
    metrics: Mapping[str, float]


def verify(
    folder: Path,
    *,
    model: LoadedModel,
    targets: Sequence[Target],
    pythons: Sequence[Path],
    score: Callable[[Path], Benchmark],
) -> list[Check]:
    """Let every target embed the same pictures and texts from `folder`, and compare the features with the model's.

    Args:
        folder: an export.
        model: in float32, in eval mode, on the CPU.
        targets: the libraries that the export has files for.
        pythons: interpreters in which to look for the libraries, before this one.
        score: writes a labelled set into a folder and evaluates the model on it; called for clip-benchmark only.

    Raises:
        UserError: an interpreter does not start.
    """
    owners = find_libraries([*pythons, Path(sys.executable)])
    checks = []
    with tempfile.TemporaryDirectory(prefix="clip-train-verify-") as scratch:
        work = Path(scratch)
        inputs = write_inputs(work, model=model)
        expected = _features(model, pixels=inputs.pixels, tokens=inputs.tokens)
        for target in targets:
            if target not in owners:
                checks.append(
                    Check(target=target, status=Status.skipped, note=f"not installed: {INSTALL[target]}")
                )  # fmt: skip
                continue
            python, version = owners[target]
            benchmark = score(work / "classes") if target is Target.clip_benchmark else None
            error = _run(target, python=python, folder=folder, work=work)
            if error:
                check = Check(target=target, status=Status.failed, version=version, note=error)
            elif benchmark is not None:
                check = _compare_scores(work / "benchmark.json", metrics=benchmark.metrics, version=version)
            elif target is Target.openai_clip:
                rounded = _rounded(model)
                theirs = _features(rounded, pixels=inputs.pixels, tokens=inputs.tokens)
                unrounded = compare(target, work / "outputs.npz", expected=expected, version=version)
                note = f"with its rounding to half precision; without {unrounded.max_difference:.1e}"
                check = compare(target, work / "outputs.npz", expected=theirs, version=version, note=note)
            else:
                check = compare(target, work / "outputs.npz", expected=expected, version=version)
            checks.append(check)
    return checks


def find_libraries(pythons: Sequence[Path]) -> dict[Target, tuple[Path, str]]:
    """Return, for each library that is installed in one of the interpreters, the first that has it, and its version.

    Raises:
        UserError: an interpreter does not start.
    """
    owners: dict[Target, tuple[Path, str]] = {}
    for python in pythons:
        try:
            done = subprocess.run(
                [python, PEERS / "versions.py"],
                capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS, env=isolated_environment(),
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"{python} does not run as a Python ({error})") from error
        for name, version in json.loads(done.stdout).items():
            owners.setdefault(Target(name), (python, version))
    return owners


def compare(
    target: Target, outputs: Path, *, expected: Mapping[str, np.ndarray], version: str, note: str = ""
) -> Check:
    """Judge a library's features [n, D] under `image` and `text` against the model's."""
    with np.load(outputs) as arrays:
        theirs = dict(arrays)
    accepted = True
    if "int8_image" in theirs:
        cosines = [(theirs[f"int8_{name}"] * value).sum(axis=1).min() for name, value in expected.items()]
        note = f"8-bit graphs: cos min {np.min(cosines):.4f}"
        accepted = bool(np.min(cosines) >= MIN_COSINE_INT8)
    # numpy's maximum, unlike Python's, keeps what is not a number; and such a difference is not within any limit.
    difference = float(np.max([np.abs(theirs[name] - value).max() for name, value in expected.items()]))
    cosine = float(np.min([(theirs[name] * value).sum(axis=1).min() for name, value in expected.items()]))
    from_files = [
        float(np.abs(theirs[f"file_{name}"] - value).max())
        for name, value in expected.items()
        if f"file_{name}" in theirs
    ]
    good = accepted and difference <= MAX_DIFFERENCE and cosine >= MIN_COSINE
    return Check(
        target=target,
        status=Status.passed if good else Status.failed,
        version=version,
        max_difference=difference,
        min_cosine=cosine,
        file_difference=max(from_files) if from_files else None,
        note=note,
    )


def table(checks: Sequence[Check]) -> str:
    """Lay the checks out for a terminal or a text file."""
    rows = [("target", "max diff", "cos min", "from files", "status", "")]
    rows += [
        (
            f"{check.target} {check.version}".strip(),
            "-" if check.max_difference is None else f"{check.max_difference:.1e}",
            "-" if check.min_cosine is None else f"{check.min_cosine:.7f}",
            "-" if check.file_difference is None else f"{check.file_difference:.1e}",
            check.status.value,
            _shortened(check.note),
        )
        for check in checks
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]).rstrip()
        for row in rows
    )


def _shortened(note: str) -> str:
    """Keep the first two of many reasons; the report has all."""
    reasons = note.split("; ")
    return note if len(reasons) <= 3 else f"{'; '.join(reasons[:2])}; and {len(reasons) - 2} more"


def _compare_scores(path: Path, *, metrics: Mapping[str, float], version: str) -> Check:
    theirs = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    different = [
        f"{name} {value}, not {metrics.get(name)}"
        for name, value in theirs.items()
        if not abs(metrics.get(name, np.nan) - value) <= 1e-6
    ]
    agreed = f"{', '.join(f'{name} {value:.4f}' for name, value in theirs.items())} on 40 pictures in both"
    return Check(
        target=Target.clip_benchmark,
        status=Status.failed if different else Status.passed,
        version=version,
        note="; ".join(different) or agreed,
    )


def _run(target: Target, *, python: Path, folder: Path, work: Path) -> str | None:
    """Run the check of one library; return why it did not get to the end, or None."""
    script = PEERS / f"check_{target.replace('-', '_').replace(' ', '_')}.py"
    for leftover in ("outputs.npz", "benchmark.json"):
        (work / leftover).unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [python, script, folder.resolve(), work],
            capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS, env=isolated_environment(), cwd=work,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"the library raised: {lines[-1][:300]}"
    return None


def isolated_environment() -> dict[str, str]:
    """Return the environment of another tool: offline, without GPUs, and without this package's own paths."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@torch.no_grad()
def _features(model: LoadedModel, *, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    raw = {"image": model.encode_image(pixels, normalize=False), "text": model.encode_text(tokens, normalize=False)}
    return {name: F.normalize(features.double(), dim=1).numpy() for name, features in raw.items()}


def _rounded(model: LoadedModel) -> LoadedModel:
    rounded = empty_model(model.config)
    rounded.load_state_dict(round_like_clip_load(model.state_dict()), assign=True)
    return rounded.eval()
