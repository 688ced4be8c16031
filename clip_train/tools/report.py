"""Write a run's report: one page that needs neither network nor scripts."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_train.attempts import attempts_so_far
from clip_train.config import read_yaml
from clip_train.errors import UserError
from clip_train.metrics.panel import duration
from clip_train.metrics.sinks import read_metrics
from clip_train.tools.charts import HEIGHT, WIDTH, Chart, compact, line_chart, show
from clip_train.tools.confidence import read_confidence
from clip_train.tools.pages import page_templates, write_page
from clip_train.tools.report_evaluations import Evaluation, Score, read_evaluations
from clip_train.tools.report_pictures import data_uri, similarity_matrix

METRIC_NAMES = {
    "acc1": "zero-shot accuracy",
    "acc5": "accuracy, right class among 5",
    "mean_per_class_recall": "mean per-class recall",
    "linear_acc1": "accuracy of a linear probe",
    "mean_recall@1": "mean recall@1",
    "lenient_mean_recall@1": "mean recall@1, equal captions count",
    "text_acc": "right caption chosen",
    "image_acc": "right picture chosen",
    "acc": "right captions and pictures chosen",
    "jaccard": "right pictures found (Jaccard)",
    "auroc": "known against foreign (AUROC)",
    "aupr": "average precision (AUPR)",
    "fpr_at_95_tpr": "foreign pictures let in (FPR at 95 % TPR)",
    "ece_before": "calibration error, as trained",
    "ece_after": "calibration error, calibrated",
}
SUMMARY_KEYS = (
    "model.name", "data.train", "data.val", "global_batch_size", "steps", "samples", "epochs", "precision", "loss.name",
    "optim.name", "optim.lr", "optim.warmup", "optim.schedule", "optim.weight_decay", "seed",
)  # fmt: skip
PACKAGES = ("clip-train", "torch", "torchvision", "numpy", "pillow")
MOST_HEADLINES = 6  # in the verdict and the tiles; a suite has dozens
NO_BETTER_THAN_GUESSING = 0.98  # share of its loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The first line of the page."""

    kind: str
    """`good`, `bad` or `open`."""
    text: str


def is_reported(path: Path) -> bool:
    """Return whether a path is the directory of a run, to which a report belongs."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the run's metrics, config and newest evaluations, and return its path.

    Raises:
        UserError: `run_dir` is not the directory of a run.
        IntegrityError: a result file is damaged.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} has no config.yaml: it is not a run directory")
    config = read_yaml(run_dir / "config.yaml")
    rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    evaluations = read_evaluations(run_dir / "evaluation")
    training = [row for row in rows if "train/loss" in row]
    environment = page_templates()
    environment.filters |= {"picture": data_uri, "show": show, "percent": lambda v: f"{100 * v:.1f}"}
    page = environment.get_template("report.html.j2").render(
        name=OmegaConf.select(config, "name") or run_dir.resolve().name,
        verdict=judge(training, evaluations),
        progress=describe_progress(training, total_steps=OmegaConf.select(config, "steps")),
        tiles=key_numbers(training, evaluations),
        charts=training_charts(training),
        evaluation_charts=evaluation_charts(rows, evaluations),
        evaluations=evaluations,
        confidence=read_confidence(run_dir),
        metric_names=METRIC_NAMES,
        matrices=[
            similarity_matrix(e.samples, name=e.label)
            for e in evaluations
            if e.samples and len(e.samples.pair_pictures)
        ],
        summary=[(key, value) for key in SUMMARY_KEYS if (value := OmegaConf.select(config, key)) is not None],
        config_text=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        environment=[*describe_attempts(run_dir), *describe_environment()],
        written=time.strftime("%Y-%m-%d %H:%M"),
        box=(WIDTH, HEIGHT),
    )
    return write_page(run_dir / "report.html", page)


def judge(rows: list[dict[str, Any]], evaluations: list[Evaluation]) -> Verdict:
    """Say in one line how the run stands, measured against guessing."""
    loss = rows[-1]["train/loss"] if rows else None
    guessing = rows[-1].get("train/loss_of_guessing") if rows else None
    collapsed = [e for e in evaluations if e.collapsed]
    headlines = [e.headline for e in evaluations if e.headline]
    lost = [s for s in headlines if s.chance is not None and (s.interval[0] if s.interval else s.value) <= s.chance]
    if collapsed:
        kind, text = "bad", f"collapsed on {collapsed[0].name}: {collapsed[0].collapsed}"
    elif rows and (loss is None or not math.isfinite(loss)):
        kind, text = "bad", "the last loss is not finite"
    elif guessing and loss > NO_BETTER_THAN_GUESSING * guessing:
        kind, text = "bad", f"no better than guessing yet: the loss is {loss:.3f}, guessing gives {guessing:.3f}"
    elif lost:
        kind, text = "bad", f"{_sentence(lost[0])}: no better than guessing on this set"
    elif headlines:
        rest = f"; {len(headlines) - MOST_HEADLINES} more sets below" if len(headlines) > MOST_HEADLINES else ""
        kind, text = "good", "; ".join(_sentence(score) for score in headlines[:MOST_HEADLINES]) + rest
    elif rows:
        against = f" against {guessing:.3f} for guessing" if guessing else ""
        kind, text = "open", f"learning: the loss is {loss:.3f}{against}; nothing has been evaluated yet"
    else:
        kind, text = "open", "nothing has been logged yet"
    return Verdict(kind=kind, text=f"{text[0].upper()}{text[1:]}.")


def _sentence(score: Score) -> str:
    chance = f", chance {100 * score.chance:.2g} %" if score.chance is not None else ""
    name = METRIC_NAMES.get(score.metric, score.metric)
    return f"{name} on {score.evaluation} {100 * score.value:.1f} %{chance}"


def describe_progress(rows: list[dict[str, Any]], *, total_steps: int | None) -> str:
    """Return steps, samples and time as one phrase."""
    if not rows:
        return "no step logged"
    last = rows[-1]
    of = f" of {total_steps:,}" if total_steps else ""
    seconds = last["time"] - rows[0]["time"]
    return f"step {last['step']:,}{of} · {compact(last['samples_seen'])} samples seen · {duration(seconds)} logged"


def key_numbers(rows: list[dict[str, Any]], evaluations: list[Evaluation]) -> list[dict[str, str]]:
    """Return the few numbers at the top: label, value and what to compare it with."""
    tiles = []
    for score in [evaluation.headline for evaluation in evaluations if evaluation.headline][:MOST_HEADLINES]:
        note = f"chance {100 * score.chance:.2g} %" if score.chance is not None else ""
        label = f"{score.evaluation} · {METRIC_NAMES.get(score.metric, score.metric)}"
        tiles.append({"label": label, "value": f"{100 * score.value:.1f} %", "note": note})
    if not rows:
        return tiles
    last = rows[-1]
    for key, label, unit, note in (
        ("train/loss", "loss", "", f"guessing {show(last.get('train/loss_of_guessing') or math.nan)}"),
        ("train/in_batch_recall@1", "recall@1 in the batch", "%", ""),
        ("train/logit_scale", "temperature (logit scale)", "", "at most 100"),
        ("perf/samples_per_second", "samples per second", "", f"waits for data {_share(last.get('perf/data_wait'))}"),
    ):
        if last.get(key) is not None:
            tiles.append({"label": label, "value": show(last[key], unit=unit), "note": note})
    return tiles


def training_charts(rows: list[dict[str, Any]]) -> list[Chart]:
    """Return the curves of training; those with too few points are left out."""
    guessing = rows[-1].get("train/loss_of_guessing") if rows else None
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("train/loss", "Loss", {"reference": ("guessing", guessing) if guessing else None, "from_zero": True}),
        ("train/in_batch_recall@1", "Recall@1 in the batch", {"unit": "%", "from_zero": True}),
        ("train/logit_scale", "Temperature (logit scale)", {}),
        ("train/learning_rate", "Learning rate", {"from_zero": True}),
        ("perf/samples_per_second", "Samples per second", {"from_zero": True}),
        ("perf/data_wait", "Share of time waiting for data", {"unit": "%", "from_zero": True}),
    ]
    charts = [
        line_chart([(row["samples_seen"], row.get(key)) for row in rows], title=title, **how)
        for key, title, how in kinds
    ]
    return [chart for chart in charts if chart]


def evaluation_charts(rows: list[dict[str, Any]], evaluations: list[Evaluation]) -> list[Chart]:
    """Return each evaluation's headline score over training, with its chance level, and the loss of its pairs."""
    charts = []
    for evaluation in evaluations:
        if evaluation.later:
            continue
        name = evaluation.name
        if score := evaluation.headline:
            charts.append(
                line_chart(
                    _points(rows, f"{name}/{score.metric}"),
                    title=f"{name} · {METRIC_NAMES.get(score.metric, score.metric)}",
                    unit="%",
                    reference=("chance", score.chance) if score.chance is not None else None,
                    from_zero=True,
                )
            )
        charts.append(line_chart(_points(rows, f"{name}/loss"), title=f"{name} · loss, all pairs as one batch"))
    return [chart for chart in charts if chart]


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(row["samples_seen"], row[key]) for row in rows if key in row]


def describe_environment() -> list[tuple[str, str]]:
    """Return what the report was written with."""
    found = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue  # a bare checkout has no metadata of its own
    return found


def describe_attempts(run_dir: Path) -> list[tuple[str, str]]:
    """Return what the run has cost so far, over all its restarts: device-hours and attempts."""
    attempts = attempts_so_far(run_dir)
    if not attempts:
        return []
    devices = " + ".join(sorted({attempt.device for attempt in attempts}))
    hours = sum(attempt.device_hours for attempt in attempts)
    return [("attempts", f"{len(attempts):,}"), (f"{devices} hours of all ranks", f"{hours:,.2f}")]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
