"""The loss doctor: ten signatures of a run that goes wrong, recognised in its rows while it trains or afterwards.

A signature is a condition on the smoothed values of a row. It is told once, when it has held for so many steps without
a break. `Doctor` takes rows as they are logged; `diagnose` takes those of a finished run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_train.evaluation.collapse import MAX_MEAN_COSINE, MIN_EFFECTIVE_RANK
from clip_train.loss.config import Duplicates, SigLipLossConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from clip_train.schema import TrainConfig

SMOOTHING_STEPS = 100  # over which values are averaged
TREND_STEPS = 500  # between two values that are compared for a trend
CLAMPED = 99.99
_SMALL_UPDATE = 1e-5  # of the weights, in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the config of a run says and its rows do not."""

    global_batch_size: int
    steps: int
    warmup: int
    workers: int
    duplicates_ignored: bool = False
    softmax: bool = True  # the loss of guessing is ln N

    @staticmethod
    def of(config: TrainConfig, *, steps: int) -> Facts:
        """Take them from a config; `steps` is the length of the run."""
        return Facts(
            global_batch_size=config.global_batch_size, steps=steps, warmup=config.optim.warmup,
            workers=config.data.workers, duplicates_ignored=config.loss.duplicates is Duplicates.ignore,
            softmax=not isinstance(config.loss, SigLipLossConfig),
        )  # fmt: skip


class Finding(NamedTuple):
    """A signature that was recognised."""

    number: int
    name: str
    step: int
    message: str  # cause and fix in a sentence


class Values:
    """The smoothed values of a row; a value that the row lacks is NaN, so that no comparison with it holds."""

    def __init__(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self._values = step, values

    def __getitem__(self, name: str) -> float:
        return self._values.get(name, math.nan)


class Look(NamedTuple):
    """What a signature is judged by."""

    now: Values
    former: Values  # of `TREND_STEPS` before; without values until then
    facts: Facts


class Signature(NamedTuple):
    """One way to go wrong."""

    number: int
    name: str
    patience: int  # steps for which it must hold
    holds: Callable[[Look], bool]
    says: Callable[[Look], str]


class Doctor:
    """Recognises signatures in the rows of one run, each once. Costs some ten microseconds a row."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._smooth: dict[str, float] = {}
        self._step = 0
        self._past: deque[Values] = deque()
        self._since: dict[int, int] = {}  # signature -> step from which it has held
        self._told: set[int] = set()

    def examine(self, row: Mapping[str, Any]) -> list[Finding]:
        """Take the next row, with its `step`, and return what has become clear by it."""
        if "train/loss" not in row:
            return []
        look = self._look(row)
        found = []
        for signature in SIGNATURES:
            if signature.number in self._told:
                continue
            if not signature.holds(look):
                self._since.pop(signature.number, None)
                continue
            since = self._since.setdefault(signature.number, look.now.step)
            if look.now.step - since >= signature.patience:
                self._told.add(signature.number)
                found.append(Finding(signature.number, signature.name, look.now.step, signature.says(look)))
        return found

    def _look(self, row: Mapping[str, Any]) -> Look:
        step = int(row["step"])
        weight = 1 - math.exp(-max(1, step - self._step) / SMOOTHING_STEPS)
        self._step = step
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                former = self._smooth.get(name, value)
                self._smooth[name] = former + weight * (value - former)
        now = Values(step, dict(self._smooth))
        self._past.append(now)
        while len(self._past) > 1 and self._past[1].step <= step - TREND_STEPS:
            self._past.popleft()
        oldest = self._past[0]
        return Look(now, oldest if oldest.step <= step - TREND_STEPS else Values(step, {}), self._facts)


def diagnose(rows: Iterable[Mapping[str, Any]], *, facts: Facts) -> list[Finding]:
    """Return every signature in the rows of a run, such as `read_metrics` gives."""
    doctor = Doctor(facts)
    return [finding for row in rows for finding in doctor.examine(row)]


def _no_better_than_guessing(look: Look) -> bool:
    now, size = look.now, look.facts.global_batch_size
    flat = now["train/loss"] > 0.98 * math.log(size) or not look.facts.softmax
    return now.step > look.facts.warmup and flat and now["train/in_batch_recall@1"] < 2 / size


def _towers(look: Look, measure: str) -> dict[str, float]:
    return {tower: look.now[f"health/{tower}_{measure}"] for tower in ("image", "text")}


def _plateau(look: Look) -> str:
    share = look.facts.warmup / look.facts.steps
    return (
        "no better than guessing: check the pairs first (`clip-train shards check`), then raise optim.lr; warm-up is "
        f"{share:.0%} of this run"
    )


def _small_steps(look: Look) -> str:
    return (
        f"steps are too small to learn: one changes the weights by {look.now['health/update_ratio']:.0e} of their size "
        f"at optim.lr={look.now['train/learning_rate']:.1e}; from scratch start near 5e-4 for a batch of 4096"
    )


def _bad_temperature(look: Look) -> bool:
    scale, former = look.now["train/logit_scale"], look.former["train/logit_scale"]
    return scale >= CLAMPED or (scale < 5 and scale < former)


def _temperature(look: Look) -> str:
    scale = look.now["train/logit_scale"]
    what = "is clamped at 100" if scale >= CLAMPED else f"has fallen to {scale:.1f}"
    return f"logit_scale {what}: lower optim.lr, or look for duplicates in the batches and for low precision"


def _duplicates(look: Look) -> str:
    kind, share = max((look.now[f"health/duplicate_{kind}"], kind) for kind in ("captions", "images"))[::-1]
    return (
        f"{share:.1%} of the pairs of a batch share their {kind.removesuffix('s')} with another and count as its "
        "mismatch: de-duplicate the shards, or set loss.duplicates=ignore for equal captions"
    )


def _is_shuffled(look: Look) -> bool:
    apart = all(cosine < 0.9 for cosine in _towers(look, "mean_cosine").values())
    learning = look.now["health/update_ratio"] >= _SMALL_UPDATE
    return _no_better_than_guessing(look) and apart and learning and look.now["health/pair_margin"] < 1


def _captions(look: Look) -> str:
    empty, cut = look.now["health/empty_captions"], look.now["health/truncated_captions"]
    return (
        f"{empty:.1%} of the captions are empty and {cut:.1%} are cut at the context length: the wrong field or suffix "
        "(data.caption), or model.text.context_length is too short; `clip-train shards show` shows what the model sees"
    )


def _stalled(look: Look) -> str:
    workers = look.facts.workers
    return (
        f"training waits for data {look.now['perf/data_wait']:.0%} of the time: data.workers={workers} -> "
        f"{max(1, 2 * workers)}, smaller stored pictures, or shards on a local disk"
    )


def _collapsed(look: Look) -> list[str]:
    cosines, ranks = _towers(look, "mean_cosine"), _towers(look, "effective_rank")
    return [t for t in cosines if cosines[t] > MAX_MEAN_COSINE or ranks[t] < MIN_EFFECTIVE_RANK]


def _drifts_apart(look: Look) -> bool:
    now, former = look.now, look.former
    rising = now["health/modality_gap"] > former["health/modality_gap"] + 0.02
    stalls = now["train/in_batch_recall@1"] <= 1.05 * former["train/in_batch_recall@1"]
    return now.step > look.facts.warmup and rising and stalls and now["health/best_cosine"] < 0.1


SIGNATURES = (
    Signature(1, "plateau", 2000, _no_better_than_guessing, _plateau),
    Signature(
        2, "small_steps", 500,
        lambda look: _no_better_than_guessing(look) and look.now["health/update_ratio"] < _SMALL_UPDATE, _small_steps,
    ),
    Signature(3, "temperature", 500, _bad_temperature, _temperature),
    Signature(
        4, "duplicates", 100,
        lambda look: look.now["health/duplicate_images"] > 0.01
        or (look.now["health/duplicate_captions"] > 0.01 and not look.facts.duplicates_ignored), _duplicates,
    ),
    Signature(
        5, "shuffled_pairs", 1000, _is_shuffled,
        lambda _: "images and texts do not belong together: true pairs are no more alike than chance ones while each "
        "tower tells its own items apart; a key or a sort order of the shards is broken",
    ),
    Signature(
        6, "captions", 100,
        lambda look: look.now["health/empty_captions"] > 0.01 or look.now["health/truncated_captions"] > 0.2, _captions,
    ),
    Signature(
        7, "wrong_gather", 0,
        lambda look: look.now["health/rank_disagreement"] > 1e-3,
        lambda look: "the ranks do not see the same negatives: their gradients differ by "
        f"{look.now['health/rank_disagreement']:.1%}, a bug in the loss or in a custom override of it",
    ),
    Signature(8, "data_stall", 200, lambda look: look.now["perf/data_wait"] > 0.1, _stalled),
    Signature(
        9, "collapse", 200,
        lambda look: look.now.step > look.facts.warmup and bool(_collapsed(look)),
        lambda look: f"the {' and the '.join(_collapsed(look))} tower maps everything to one point: lower optim.lr, "
        "check normalisation and locked layers",
    ),
    Signature(
        10, "modality_gap", 500, _drifts_apart,
        lambda _: "the towers drift apart: check the bounds of logit_scale, the side of the loss, and that both towers "
        "receive gradients",
    ),
)  # fmt: skip
