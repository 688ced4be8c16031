"""What is known of weights that are exported: their run, its data, its cost and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from clip_train.attempts import attempts_so_far
from clip_train.checkpoint.config import EMA_SUFFIX
from clip_train.checkpoint.load import load_train_state
from clip_train.data.order import MIXTURE_BLOCK
from clip_train.interop.export.card import CardScore, Provenance
from clip_train.interop.folders import EXPORT_FILE, RUN_CONFIG_FILE, is_average, read_json
from clip_train.tools.report_evaluations import LATER, read_evaluations


def describe_origin(origin: Path, *, weights: str, name: str) -> Provenance:
    """Return what is known of weights that come from the file or checkpoint `origin`.

    The scores are those of the evaluations at the step of the checkpoint, of these weights first, then of the others
    that the run keeps, if any. What an export knew of its weights goes on to the next.
    """
    if (origin.parent / EXPORT_FILE).is_file():
        record = read_json(origin.parent / EXPORT_FILE)
        return Provenance(
            name=str(record.get("name", name)),
            origin=str(record.get("origin", origin.parent.name)),
            weights=str(record.get("weights", weights)),
            run_config=record.get("run"),
            data=record.get("data") or _data((record.get("run") or {}).get("data", {}), state={}),
            cost=record.get("cost", {}),
            scores=[CardScore(**score) for score in record.get("scores", [])],
        )
    if not (origin.is_dir() and (origin / RUN_CONFIG_FILE).is_file()):
        return Provenance(name=name, origin=origin.name, weights=weights)
    config = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(origin / RUN_CONFIG_FILE), resolve=False))
    state = load_train_state(origin)
    run_dir, step = origin.parent.parent, int(state["step"])
    averaged = is_average(origin, weights=weights)
    run_name = str(config.get("name") or run_dir.resolve().name)
    return Provenance(
        name=run_name,
        origin=f"{run_name}, step {step:,}",
        weights="ema" if averaged else "raw",
        run_config=config,
        data=_data(config.get("data", {}), state=state),
        cost=_cost(run_dir),
        scores=_scores(run_dir / "evaluation", step=step, averaged=averaged),
    )


def _data(config: Mapping[str, Any], *, state: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run and the state of its checkpoint know of the training data."""
    if config.get("train") is None:
        return {}
    rows = {"shards": f"`{config['train']}`", "captions": f"`{config.get('caption', 'txt')}`"}
    stream: Mapping[str, Any] = state.get("progress", {}).get("data", {})
    if not stream:
        return rows
    sources = stream["segments"][-1]["sources"] if "segments" in stream else []
    for source in sources:
        share = f", {source['quota'] / MIXTURE_BLOCK:.1%} of a batch" if len(sources) > 1 else ""
        rows[f"samples of `{source['name']}`"] = f"{source['epoch_samples']:,}{share}; index `{source['fingerprint']}`"
    seen = f"{state['consumed']:,} pairs"
    if len(sources) == len(stream.get("segments", [])) == 1:
        seen += f", {state['consumed'] / sources[0]['epoch_samples']:.2f} epochs"
    bad = ", ".join(f"{count:,} {reason}" for reason, count in stream.get("bad", {}).items())
    return {**rows, "seen": seen, "among them unusable": bad or "none"}


def _cost(run_dir: Path) -> dict[str, str]:
    """Return what all attempts at a run have cost so far."""
    attempts = attempts_so_far(run_dir)
    hours: dict[str, float] = {}
    for attempt in attempts:
        hours[attempt.device] = hours.get(attempt.device, 0.0) + attempt.device_hours
    return {f"{device} hours, all ranks and attempts": f"{spent:,.2f}" for device, spent in hours.items()}


def _scores(folder: Path, *, step: int, averaged: bool) -> list[CardScore]:
    def percent(value: float) -> str:
        return f"{100 * value:.2f} %"

    evaluations = [evaluation for evaluation in read_evaluations(folder) if evaluation.step == step]
    other = ", raw weights" if averaged else ", moving average"
    own = [evaluation for evaluation in evaluations if evaluation.name.endswith(EMA_SUFFIX) == averaged]
    return [
        CardScore(
            evaluation=evaluation.name.removesuffix(EMA_SUFFIX)
            + ("" if evaluation in own else other)
            + (LATER if evaluation.later else ""),
            metric=f"{row.part}: {row.metric}" if row.part else row.metric,
            value=percent(row.value),
            interval=" – ".join(percent(end) for end in row.interval) if row.interval else "not measured",
            chance="not measured" if row.chance is None else percent(row.chance),
            num_items="not measured" if row.num_items is None else f"{row.num_items:,}",
            verdict=row.verdict,
        )
        for evaluation in sorted(evaluations, key=lambda evaluation: evaluation not in own)
        for row in evaluation.scores
    ]
