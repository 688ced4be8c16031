"""Run the first steps of a planned run on this machine, in a directory that is deleted afterwards, and measure them."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clip_train.errors import ClipTrainError, UserError, writing
from clip_train.evaluation.result import read_result
from clip_train.exit_record import read_exit
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.launch.local import thread_defaults
from clip_train.tools.plan.sampled_evaluation import MEASURED
from clip_train.tools.ranks import last_lines, run_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clip_train.schema import TrainConfig

WINDOWS = 12  # of so many steps each that the probe takes about
SECONDS_OF_STEPS = 30.0
_MOST_STEPS_PER_WINDOW = 20
_WARMUP_WINDOWS = 2
_SECONDS_TO_END = 1800.0
_EFFICIENCY = 0.3  # of a matrix product's speed, that a step is guessed to have


class ProbeFailed(ClipTrainError):
    """The run would have ended within its first steps."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTime:
    """Seconds of one evaluation."""

    whole: float
    spent: float  # in the probe, which may have done a part


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What the first steps of a run take on this machine."""

    ranks: int
    steps: int
    seconds: float  # of the process, from its start to its end
    step_seconds: float
    data_wait: float  # share of a step's time
    saves: int
    save_seconds: float  # by which one save holds up training
    evaluations: dict[str, EvaluationTime]
    memory_bytes: int  # most of a rank: of its device, or resident on the CPU
    family_bytes: int  # most of a rank and its loader processes together in the host's memory

    @property
    def fixed_seconds(self) -> float:
        """What a run takes besides its steps, saves and evaluations: start, warm-up and end."""
        spent = self.steps * self.step_seconds + (self.saves - 1) * self.save_seconds
        return self.seconds - spent - sum(one.spent for one in self.evaluations.values())


def probe(
    config: TrainConfig, overrides: Sequence[str], *, ranks: int, rows: int, steps: int, flops_per_step: float
) -> ProbeResult:
    """Run the first steps on this machine and return what they take. Nothing is left of them.

    Args:
        config: the run's.
        overrides: what it was composed from.
        ranks: processes to start, on one GPU each if there are GPUs.
        rows: pairs of each.
        steps: length of the whole run.
        flops_per_step: of one rank, to guess how many steps are enough.

    Raises:
        ProbeFailed: the run would have ended; the message says why.
        UserError: it would have been refused, or no directory can be made beside its own.
    """
    window = _steps_per_window(flops_per_step, device=config.device)
    few = min(steps, window * WINDOWS)
    # A save in the middle lengthens steps and takes memory, if the run has any.
    save_every = max(1, few // 3 // window * window) if config.checkpoint.every < steps else few
    folder = _folder_beside(Path(config.run_dir))
    try:
        short = {
            "run_dir": str(folder / "run"), "steps": few, "window": window, "save_every": save_every,
            "global_batch_size": ranks * rows,
        }  # fmt: skip
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"overrides": list(overrides), "short": short}), encoding="utf-8")
        variables = thread_defaults(ranks) if config.launch.name == "local" else {}  # torchrun has its own
        seconds = _run(spec, ranks=ranks, log=folder / "log", variables=variables)
        return _read(folder, seconds=seconds, ranks=ranks, steps=few, save_every=save_every)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path, *, seconds: float, ranks: int, steps: int, save_every: int) -> ProbeResult:
    run_dir = folder / "run"
    rows = [row for row in read_metrics(run_dir) if "perf/step_seconds" in row]
    timing = steady_steps(rows, save_every=save_every)
    told = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    on_device = max(row["perf/memory_gib"] for row in rows) * 2**30
    results = {
        file.stem: read_result(file)["clip_train"]
        for file in sorted((run_dir / "evaluation").glob("step-*/*.json"))
        if not file.name.endswith(".samples.json")
    }
    return ProbeResult(
        ranks=ranks,
        steps=steps,
        seconds=seconds,
        step_seconds=timing.step_seconds,
        data_wait=timing.data_wait,
        saves=-(-steps // save_every),
        save_seconds=timing.save_seconds,
        evaluations={n: EvaluationTime(whole=one["seconds"], spent=one[MEASURED]) for n, one in results.items()},
        memory_bytes=round(on_device) if _is_cuda(run_dir) else max(one["resident_bytes"] for one in told),
        family_bytes=max(one["family_bytes"] for one in told),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Time of steps once they take equally long."""

    step_seconds: float
    data_wait: float
    save_seconds: float


def steady_steps(rows: Sequence[Mapping[str, Any]], *, save_every: int) -> StepTimes:
    """Return the mean time of a step, and by how much a save lengthens the window behind it.

    The first windows are left out where there are others, and those behind a save.
    """
    previous = [0, *(row["step"] for row in rows[:-1])]
    behind_save = [step > 0 and step % save_every == 0 for step in previous]
    steady = [row for i, row in enumerate(rows) if i >= _WARMUP_WINDOWS and not behind_save[i]] or rows[-1:]
    mean = sum(row["perf/step_seconds"] for row in steady) / len(steady)
    excess = [
        (row["perf/step_seconds"] - mean) * (row["step"] - before)
        for row, before, saved in zip(rows, previous, behind_save, strict=True)
        if saved
    ]
    return StepTimes(
        step_seconds=mean,
        data_wait=sum(row["perf/data_wait"] for row in steady) / len(steady),
        save_seconds=max(0.0, sum(excess) / len(excess)) if excess else 0.0,
    )


def _run(spec: Path, *, ranks: int, log: Path, variables: Mapping[str, str]) -> float:
    """Start the ranks, wait for them, and return the seconds that they took."""
    began = time.monotonic()
    code = run_ranks(
        "clip_train.tools.plan.probe_rank", [str(spec)], ranks=ranks, log=log, seconds=_SECONDS_TO_END,
        variables=variables,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if code is None:
        raise ProbeFailed(f"the first steps took more than {_SECONDS_TO_END / 60:.0f} minutes")
    if code:
        record = read_exit(spec.parent / "run")
        reason = record.reason if record and record.code else last_lines(log)
        raise (UserError if record and record.code == UserError.exit_code else ProbeFailed)(reason)
    return seconds


def _steps_per_window(flops_per_step: float, *, device: str) -> int:
    """Guess a number of steps from the speed of a matrix product."""
    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size = 4096 if where == "cuda" else 768
    matrix = torch.ones(size, size, device=where)
    for _ in range(2):  # the first loads the library
        began = time.monotonic()
        (matrix @ matrix).sum().item()
        seconds = time.monotonic() - began
    step_seconds = flops_per_step * seconds / (2 * size**3) / _EFFICIENCY
    return max(1, min(_MOST_STEPS_PER_WINDOW, int(SECONDS_OF_STEPS / WINDOWS / max(step_seconds, 1e-9))))


def _folder_beside(run_dir: Path) -> Path:
    """Make a folder on the disk that the run's checkpoints will lie on."""
    place = next(parent for parent in run_dir.absolute().parents if parent.is_dir())
    with writing(f"run_dir={run_dir}"):
        return Path(tempfile.mkdtemp(prefix=".plan-", dir=place))


def _is_cuda(run_dir: Path) -> bool:
    return json.loads((run_dir / "attempts.jsonl").read_text(encoding="utf-8").splitlines()[-1])["device"] == "cuda"
