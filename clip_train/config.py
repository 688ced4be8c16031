"""The whole configuration of a run: gathers each part's dataclass, composes it with Hydra and checks it.

YAML under `configs/` holds values; the dataclasses hold types, units and rules. Nothing here imports torch, so that a
misspelt key is refused in well under two seconds.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from clip_train.checkpoint.config import CheckpointConfig
from clip_train.config_dir import config_dir
from clip_train.data.config import DataConfig
from clip_train.distributed.config import DistributedConfig, Strategy
from clip_train.errors import UserError
from clip_train.evaluation.config import ClassifyConfig, EvaluationConfig, RetrieveConfig
from clip_train.loss.config import ClipLossConfig, LossConfig, SigLipLossConfig
from clip_train.metrics.config import LoggingConfig
from clip_train.model.config import ModelConfig
from clip_train.optim.config import AdamWConfig, OptimConfig
from clip_train.tokenizer.config import TOKENIZERS, TokenizerConfig

CHOICES: dict[str, dict[str, type]] = {
    "data": {"shards": DataConfig},
    "model": {"clip": ModelConfig},
    "tokenizer": {**TOKENIZERS},
    "loss": {"clip": ClipLossConfig, "siglip": SigLipLossConfig},
    "optim": {"adamw": AdamWConfig},
    "distributed": {"ddp": DistributedConfig},
    "evaluation": {"classify": ClassifyConfig, "retrieve": RetrieveConfig},
    "logging": {"default": LoggingConfig},
}
"""Group -> name -> dataclass. A YAML file extends `base_NAME`, or `base` where a group has one class for all its files.
Where there are several, the `name` field must say which."""

NAMED = ("tokenizer", "loss", "optim")
"""Groups whose dataclass depends on the choice: a written config tells it by `name`."""

MAY_CHANGE_ON_RESUME = (
    "steps", "samples", "epochs", "max_hours", "run_dir", "resume", "device", "global_batch_size", "micro_batch_size",
    "profile",
    "data.workers", "optim.lr", "optim.warmup", "distributed", "checkpoint", "logging", "evaluation",
)  # fmt: skip
"""Keys (with all below them) that a resumed run may be given anew; any other change is refused."""


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(StrEnum):
    stop = "stop"
    skip_step = "skip_step"


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
    """When a loss or gradient is NaN or infinite: `stop`, or `skip_step` (at most 10 in a row). Weights stay finite."""
    profile: str | None = None
    """Steps to trace, as FIRST:LAST or one number, counted from 1: `profile=10:13` writes torch profiler traces to
    `profile/` in run_dir. null: none."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: dict[str, EvaluationConfig] = field(default_factory=dict)
    """Evaluations by name, run every `evaluation.NAME.every` steps and at the end."""

    def __post_init__(self) -> None:
        if isinstance(self.micro_batch_size, str):
            if self.micro_batch_size != "auto":
                raise UserError(f"micro_batch_size={self.micro_batch_size} must be a number, auto or null")
            if self.distributed.strategy is Strategy.fsdp:
                raise UserError(
                    "micro_batch_size=auto needs distributed.strategy=ddp: with fsdp a rank that runs out of memory "
                    "would leave the others waiting; give a number"
                )
        elif self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"micro_batch_size={self.micro_batch_size} must be positive")
        for key in ("global_batch_size", "steps", "samples", "epochs", "max_hours"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"{key}={value} must be positive")
        self.profiled_steps()
        given = [key for key in ("steps", "samples", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of steps, samples and epochs, not {' and '.join(given) or 'none of them'}"
            )
        if self.steps is not None:
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

    def total_steps(self, num_samples: int) -> int:
        """Return the length of the run in steps, given the size of the training data.

        Raises:
            UserError: warm-up or profiled steps do not end before the run does.
        """
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else (self.epochs or 0) * num_samples
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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: dict[str, EvaluationConfig] = field(default_factory=dict)
    """Evaluations by name; empty: those that the run was trained with."""


ROOTS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}


def load(command: str, overrides: list[str]) -> Any:
    """Compose `configs/COMMAND.yaml` with Hydra `overrides` and return its checked dataclass.

    Raises:
        UserError: an unknown key (the nearest right one is named), a wrong type or a broken rule.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(compose(command, overrides))
    except (OmegaConfBaseException, AttributeError) as error:  # the latter where `+key=` adds what no dataclass has
        raise UserError(_explain(command, overrides, error)) from error


def compose(command: str, overrides: list[str]) -> Any:
    """Compose `configs/COMMAND.yaml` with Hydra `overrides`; the unresolved OmegaConf node.

    Raises:
        UserError: as `load`, as far as composing shows it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        _refuse_code_and_secrets(override)
    register()
    try:
        with initialize_config_dir(config_dir=str(config_dir().resolve()), version_base="1.3"):
            composed = hydra_compose(command, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(command, overrides, error)) from error
    _refuse_environment(composed)
    return composed


def register() -> None:
    """Tell Hydra's ConfigStore every dataclass, under the names that the YAML files extend."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, schema in ROOTS.items():
        store.store(name=f"base_{name}", node=schema)
    for group, choices in CHOICES.items():
        for name, schema in choices.items():
            store.store(group=group, name=f"base_{name}", node=schema)
            if len(choices) == 1:
                store.store(group=group, name="base", node=schema)


def to_yaml(config: Any) -> str:
    """Return a dataclass config as YAML that `from_yaml` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: Path, *, root: type = TrainConfig) -> Any:
    """Read a config that `to_yaml` wrote.

    Raises:
        UserError: the file is missing, is not YAML, or holds a key or value that this version does not know.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values: Any = OmegaConf.create(path.read_text(encoding="utf-8"))
        schema = OmegaConf.structured(root)
        for group in (g for g in NAMED if g in values):
            schema[group] = OmegaConf.structured(_choice(group, values[group].get("name"), path))
        for name, evaluation in values.get("evaluation", {}).items():
            schema.evaluation[name] = OmegaConf.structured(_choice("evaluation", evaluation.get("name"), path))
        return OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def changes(old: str, new: str) -> list[str]:
    """Return `key: old -> new` for every key that differs between two `to_yaml` texts and may not change on resume."""
    from omegaconf import OmegaConf

    before, after = (
        dict(_flatten(OmegaConf.to_container(OmegaConf.create(text), resolve=False))) for text in (old, new)
    )
    free = tuple(key + "." for key in MAY_CHANGE_ON_RESUME)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent") and not (key + ".").startswith(free)
    ]


def known_keys(root: type) -> dict[str, tuple[type, str]]:
    """Return every key below dataclass `root`, dotted, with the class and the field that declare it."""
    found: dict[str, tuple[type, str]] = {}
    hints = get_type_hints(root)
    for item in fields(root):
        classes = _classes_of(item.name, hints[item.name])
        found[item.name] = (root, item.name)
        middle = ".NAME" if item.name == "evaluation" else ""
        for schema in classes:
            found |= {f"{item.name}{middle}.{key}": place for key, place in known_keys(schema).items()}
    return found


def _classes_of(group: str, hint: Any) -> list[type]:
    if group in CHOICES:
        return list(CHOICES[group].values())
    return [t for t in (hint, *get_args(hint)) if is_dataclass(t) and isinstance(t, type)]


def _choice(group: str, name: str | None, path: Path) -> type:
    if name not in CHOICES[group]:
        raise UserError(f"{path}: {group}.name={name} is not one of {', '.join(CHOICES[group])}")
    return CHOICES[group][name]


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(prefix.rstrip("."), tree)]
    return [pair for key, value in tree.items() for pair in _flatten(value, f"{prefix}{key}.")]


def _refuse_code_and_secrets(override: str) -> None:
    key = override.partition("=")[0]
    if "_target_" in override:
        raise UserError(f"{override}: a config holds values, never code (_target_)")
    if re.search(r"(password|secret|api_?key|access_?token|auth_?token)", key, re.IGNORECASE):
        raise UserError(f"{key}: keys and passwords come from the environment or a login, never from the config")


def _refuse_environment(composed: Any) -> None:
    """A run saves its config: what stands in the environment, a password perhaps, must not land there."""
    from omegaconf import OmegaConf

    for key, value in _flatten(OmegaConf.to_container(composed, resolve=False)):
        if isinstance(value, str) and "${oc.env" in value:
            raise UserError(f"{key}={value}: a config does not read the environment; let the shell expand $NAME")


def _explain(command: str, overrides: list[str], error: Exception) -> str:
    """Turn Hydra's message into one line that names the key and the nearest right one."""
    text = str(error)
    groups = [p.name for p in config_dir().iterdir() if p.is_dir()]
    keys = known_keys(ROOTS[command])
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        plain = _plain(key)
        if plain in keys or key in groups or plain == "evaluation.NAME" or key.startswith(("hydra", "-")):
            continue
        near = difflib.get_close_matches(plain, [*keys, *groups], n=1, cutoff=0.5)
        tail = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = near or tail
        named = hint[0].replace("evaluation.NAME", ".".join(key.split(".")[:2])) if hint else ""
        return f"unknown key '{key}'" + (
            f": did you mean '{named}'?" if hint else f"; `clip-train {command} --help` lists them"
        )
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if missing:
        group, value = missing.groups()
        options = sorted(p.stem for p in (config_dir() / group).glob("*.yaml"))
        similar = difflib.get_close_matches(value, options, n=1, cutoff=0.3)
        question = f"did you mean {similar[0]}? " if similar else ""
        return f"{group}={value} is not there: {question}choose one of {', '.join(options)}"
    full_key = re.search(r"full_key: (\S+)", text)
    merging = re.search(r"Error merging override (\S+?)=", text)
    if merging and error.__cause__ is not None:
        return f"{merging.group(1)}: {str(error.__cause__).splitlines()[0]}"
    if full_key and "missing mandatory value" in text:
        return f"{full_key.group(1)}= is required; `clip-train help {_plain(full_key.group(1))}` says what it is"
    first = text.strip().splitlines()[0]
    return f"{full_key.group(1)}: {first}" if full_key else first


def _plain(key: str) -> str:
    """Return a key as `known_keys` lists it: the user's names of evaluations are not keys."""
    return re.sub(r"^evaluation\.[^.]+", "evaluation.NAME", key)
