"""The dataclasses that gather every part's choices: what a run's config may hold, and the rules across its parts.

Nothing here imports torch, so that a misspelt key is refused in well under two seconds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.checkpoint.config import EMA_SUFFIX, CheckpointConfig
from clip_train.data.config import DataConfig, Reader
from clip_train.distributed.config import MOST_SECONDS, DistributedConfig, Strategy
from clip_train.distributed.launch_config import LaunchConfig, LocalLaunchConfig, SlurmLaunchConfig
from clip_train.errors import UserError
from clip_train.evaluation.calibrate.config import CalibrateConfig
from clip_train.evaluation.choose.config import ChooseConfig
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.config import EvaluationConfig, ReferenceConfig
from clip_train.evaluation.group_audit.config import GroupAuditConfig
from clip_train.evaluation.probe.config import ProbeConfig
from clip_train.evaluation.reject.config import RejectConfig
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.evaluation.scorecard.config import ScorecardConfig
from clip_train.loss.config import ClipLossConfig, LossConfig, SigLipLossConfig
from clip_train.metrics.config import LoggingConfig
from clip_train.model.config import ModelConfig
from clip_train.optim.config import AdamWConfig, OptimConfig
from clip_train.sweep_config import SweepConfig
from clip_train.tokenizer.config import TOKENIZERS, TokenizerConfig

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.loss.base import Loss

CHOICES: dict[str, dict[str, type]] = {
    "data": {"shards": DataConfig},
    "model": {"clip": ModelConfig},
    "tokenizer": {**TOKENIZERS},
    "loss": {"clip": ClipLossConfig, "siglip": SigLipLossConfig},
    "optim": {"adamw": AdamWConfig},
    "distributed": {"ddp": DistributedConfig},
    "launch": {"none": LaunchConfig, "local": LocalLaunchConfig, "slurm": SlurmLaunchConfig},
    "evaluation": {
        "calibrate": CalibrateConfig,
        "choose": ChooseConfig,
        "classify": ClassifyConfig,
        "group_audit": GroupAuditConfig,
        "probe": ProbeConfig,
        "reject": RejectConfig,
        "retrieve": RetrieveConfig,
        "scorecard": ScorecardConfig,
    },
    "logging": {"default": LoggingConfig},
}
"""Group -> name -> dataclass. A YAML file extends `base_NAME`, or `base` where a group has one class for all its files.
Where there are several, the `name` field must say which."""

LENGTHS = ("steps", "samples", "epochs")
"""Keys of which one says how long a run is."""

NAMED = ("tokenizer", "loss", "optim", "launch")
"""Groups whose dataclass depends on the choice: a written config tells it by `name`."""

MAY_CHANGE_ON_RESUME = (
    "name", "steps", "samples", "epochs", "max_hours", "run_dir", "resume", "device", "global_batch_size",
    "micro_batch_size", "profile", "on_nonfinite", "watchdog_seconds", "data.train", "data.val", "data.index_dir",
    "data.workers", "data.cache", "data.public_only", "data.on_change", "data.skip_samples", "data.max_bad_fraction",
    "model.ragged", "model.checkpointing", "model.compile", "loss.exchange", "optim.lr", "optim.warmup",
    "optim.max_grad_norm", "distributed", "checkpoint", "logging", "evaluation", "launch",
)  # fmt: skip
"""Keys (with all below them) that a resumed run may be given anew; any other change is refused. They say where things
are and how they are computed, or are what messages advise to change."""


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(StrEnum):
    stop = "stop"
    skip_step = "skip_step"
    rewind = "rewind"


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run."""

    name: str = "run"
    """Name of the run; a recipe under configs/experiment/ brings its own."""
    run_dir: str = "runs/${name}"
    """Folder of checkpoints, metrics and report. The same command finds it again and continues."""
    resume: str = "auto"
    """`auto` continues from the newest good checkpoint of run_dir, `never` starts afresh, a PATH continues there."""
    seed: int = 0
    """Decides initial weights, data order, crops and dropout."""
    device: str = "auto"
    """`auto` (CUDA if present, else CPU), `cpu`, `cuda` or `cuda:N`."""
    precision: Precision = Precision.bf16
    """`fp32`, or autocast with float32 weights: `bf16`, or `fp16` with loss scaling for GPUs that lack bf16."""
    global_batch_size: int = 1024
    """Pairs per optimizer step over all ranks; each image is contrasted with this many captions."""
    micro_batch_size: int | str | None = None
    """Pairs per rank in one forward pass; fewer than the rank has save memory, with the same gradients. null: all;
    `auto`: as many as fit the GPU, found at the start, written to the run's config.yaml and kept when it continues."""
    steps: int | None = None
    """Length of the run in optimizer steps. Give exactly one of steps, samples and epochs."""
    samples: int | None = None
    """Length of the run in image-caption pairs seen."""
    epochs: float | None = None
    """Length of the run in passes over the training data."""
    max_hours: float | None = None
    """Save and stop after this many hours of this process; null: no limit."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """When a loss or gradient is NaN or infinite: `stop`; `skip_step`, at most 10 in a row; or `rewind` to the newest
    checkpoint and on with the data after the bad batch, at most 3 times to one. Weights stay finite in any case."""
    watchdog_seconds: float | None = 270.0
    """Seconds without a step after which a process counts as hung: it writes the stacks of its threads to
    `rank-NNN.stacks.txt` in run_dir and ends with code 70. The first step, evaluations and saves may take 12 times as
    long, and no step counts as hung before 10 times the longest one so far. null: never."""
    profile: str | None = None
    """Steps to trace, as FIRST:LAST or one number, counted from 1: `profile=10:13` writes torch profiler traces to
    `profile/` in run_dir. null: none."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: dict[str, EvaluationConfig] = field(default_factory=dict)
    """Evaluations by name, run every `evaluation.NAME.every` steps and at the end; on the moving average of the weights
    too if `optim.ema_decay` keeps one, as NAME_ema."""

    def __post_init__(self) -> None:
        self._check_values()
        self.run_dir = str(Path(self.run_dir).expanduser())
        self._check_micro_batch_size()
        if self.data.skip_samples and self.resume in ("auto", "never"):
            raise UserError(f"data.skip_samples={self.data.skip_samples} needs resume=CHECKPOINT, to skip from there")
        self.profiled_steps()
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of steps, samples and epochs, not {' and '.join(given) or 'none of them'}"
            )
        if self.samples is not None:
            self._check_countable(self.samples)
        if self.steps is not None:
            self._check_countable(self.steps * self.global_batch_size)
            self._check_length(self.steps)
        for group in NAMED:
            choices, chosen = CHOICES[group], getattr(self, group)
            if choices.get(chosen.name) is not type(chosen):
                raise UserError(
                    f"{group}.name={chosen.name} does not fit its settings: choose one of {', '.join(choices)}"
                )
        if isinstance(self.loss, SigLipLossConfig) and self.model.init_logit_bias is None:
            raise UserError(
                "loss=siglip needs a bias: model.init_logit_bias=-10 model.init_logit_scale=2.302585 (ln 10)"
            )
        self._check_cache_features()
        self._check_evaluations()

    def _check_values(self) -> None:
        for key in ("name", "run_dir", "resume"):
            if not getattr(self, key).strip():
                raise UserError(f"{key}= must not be empty")
        for key in ("global_batch_size", *LENGTHS, "max_hours", "watchdog_seconds"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key}={value} must be positive and finite")
        if self.watchdog_seconds is not None and self.watchdog_seconds > MOST_SECONDS:
            raise UserError(f"watchdog_seconds={self.watchdog_seconds} must be at most {MOST_SECONDS}; null: never")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must lie in [0, 2^63)")

    def _check_micro_batch_size(self) -> None:
        size = self.micro_batch_size
        if isinstance(size, str):
            if size != "auto":
                raise UserError(f"micro_batch_size={size} must be a number, auto or null")
            if self.distributed.strategy is Strategy.fsdp:
                raise UserError(
                    "micro_batch_size=auto needs distributed.strategy=ddp: with fsdp a rank that runs out of memory "
                    "would leave the others waiting; give a number"
                )
        elif size is not None and size < 1:
            raise UserError(f"micro_batch_size={size} must be positive")

    def _check_cache_features(self) -> None:
        if not self.model.vision.cache_features:
            return
        if self.data.reader is Reader.streaming:
            raise UserError("model.vision.cache_features=true needs data.reader=indexed: a stream cannot be numbered")
        for key in ("flip", "color_jitter", "randaugment"):
            if value := getattr(self.data, key):
                raise UserError(
                    f"data.{key}={value} has no effect with model.vision.cache_features=true: pictures are seen once, "
                    "as they are"
                )

    def build_loss(self, *, world: World) -> Loss:
        """Make the loss for the ranks of `world`, over prefixes too for a Matryoshka model. Called by every rank."""
        from clip_train.loss.matryoshka import MatryoshkaLoss

        loss, sizes = self.loss.build(world=world), list(self.model.matryoshka)
        return MatryoshkaLoss(loss, sizes=sizes) if sizes else loss

    def total_steps(self, num_samples: int) -> int:
        """Return the length of the run in steps, given the size of the training data.

        Raises:
            UserError: warm-up or profiled steps do not end before the run does, or the run is too long to be counted.
        """
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else (self.epochs or 0) * num_samples
        self._check_countable(samples)
        total = max(1, round(samples / self.global_batch_size))
        self._check_length(total)
        return total

    def profiled_steps(self) -> tuple[int, int] | None:
        """Return the first and last step of `profile`, None for none.

        Raises:
            UserError: it is not FIRST:LAST or one number.
        """
        if self.profile is None:
            return None
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.profile)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"profile={self.profile} must be FIRST:LAST or one step, counted from 1, as in 10:13")
        return first, last

    def _check_evaluations(self) -> None:
        if taken := [name for name in self.evaluation if name.endswith(EMA_SUFFIX)]:
            raise UserError(f"evaluation.{taken[0]}: names that end in {EMA_SUFFIX} are those of the moving average")
        averaged = [f"{name}{EMA_SUFFIX}" for name in self.evaluation if self.optim.ema_decay is not None]
        best, results = self.checkpoint.best, [*self.evaluation, *averaged]
        if best is not None and best.removeprefix("-").split("/")[0] not in results:
            known = ", ".join(f"{name}/…" for name in results) or "none: name some with evaluation=[...]"
            raise UserError(f"checkpoint.best={best} must be a metric of an evaluation; there are {known}")

    def _check_countable(self, samples: float) -> None:
        if samples >= 2**63:  # positions in the data are of 64 bits
            length = next(f"{key}={value}" for key in LENGTHS if (value := getattr(self, key)) is not None)
            raise UserError(f"{length} is a run of more samples than can be counted: at most 2^63")

    def _check_length(self, total: int) -> None:
        if self.optim.warmup >= total:
            raise UserError(f"optim.warmup={self.optim.warmup} must be below steps={total}")
        if (profiled := self.profiled_steps()) and profiled[1] > total:
            raise UserError(f"profile={self.profile} must lie within steps={total}")


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """Everything that decides an evaluation of a trained model."""

    checkpoint: str = "???"
    """What to evaluate: a run directory, a checkpoint, or anything that `clip_train.load` takes."""
    device: str = "auto"
    """`auto` (CUDA if present, else CPU), `cpu`, `cuda` or `cuda:N`."""
    output: str | None = None
    """Folder for the result files; null: `evaluation/` in the run directory, or the current folder."""
    embed_dim: int | None = None
    """Evaluate with only so many first dimensions of each embedding, of a model trained with `model.matryoshka`; null:
    with all."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: dict[str, EvaluationConfig] = field(default_factory=dict)
    """Evaluations by name; empty: those that the run was trained with."""
    suite: str | None = None
    """A list of evaluations under configs/suite/, such as `imagenet`: those whose data are there are run, the
    others are listed. null: none."""
    evaluation_root: str | None = None
    """Folder that holds a suite's evaluation sets."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self) -> None:
        if self.suite is not None and self.evaluation_root is None:
            raise UserError(f"suite={self.suite} needs evaluation_root=DIR, the folder that holds its sets")


class Gpu(StrEnum):
    A100_40GB = "A100_40GB"
    A100_80GB = "A100_80GB"
    H100 = "H100"
    H200 = "H200"


@dataclass(slots=True, kw_only=True)
class PlanOptions:
    """What `clip-train plan` has to know besides the run."""

    processes: int | None = None
    """Ranks of the run. null: those that `launch` starts, else one for each GPU that this machine shows, or one."""
    gpu: Gpu | None = None
    """Plan for this GPU instead of this machine. The time is then an estimate from its peak; nothing is run."""
    price: float | None = None
    """What an hour of one GPU costs, of one process on a CPU, in any currency. null: no money."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"plan.processes={self.processes} must be positive")
        if self.price is not None and not self.price >= 0:
            raise UserError(f"plan.price={self.price} must not be negative")


@dataclass(slots=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A training run and what its plan depends on besides."""

    plan: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)

    def run(self) -> TrainConfig:
        """Return the run that is planned."""
        return TrainConfig(**{item.name: getattr(self, item.name) for item in fields(TrainConfig)})


ROOTS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig, "plan": PlanConfig, "sweep": SweepConfig}
