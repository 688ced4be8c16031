"""What a sweep is: its options, its space and the config of its runs, checked and kept as `sweep.yaml`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.config import changes, load
from clip_train.errors import UserError, first_of
from clip_train.redact import redact
from clip_train.schema import LENGTHS
from clip_train.sweep_config import Pruner, SweepOptions
from clip_train.tools.sweep.objective import Objective, objective_of, require_intermediate
from clip_train.tools.sweep.space import SPACE_PREFIX, Range, parse_space

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clip_train.schema import TrainConfig

BATCH_SIZE = "global_batch_size"
SETTINGS_NAME = "sweep.yaml"
_SECTION = "sweep"
_MAY_CHANGE = (
    *(f"sweep.{name}" for name in ("trials", "parallel", "processes_per_trial", "max_failures", "dir")),
    *(f"train.{name}" for name in ("device", "max_hours", "watchdog_seconds", "profile", "data.workers", "data.cache")),
    *(f"train.{name}" for name in ("distributed", "launch", "logging", "checkpoint")),
)
"""Keys that do not decide what a trial gives: the same sweep may go on with other values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A sweep as the command line describes it."""

    options: SweepOptions
    space: list[Range]
    objective: Objective
    base: TrainConfig
    """Config of a run before a trial's values are put in."""
    overrides: list[str]
    """What the command line says of the runs, KEY=VALUE."""
    recipe_batch_size: int
    """`global_batch_size` that the learning rate was chosen for: without what the command line says of it."""
    folder: Path

    def to_yaml(self) -> str:
        """Return options, space and config of the runs as one text."""
        from omegaconf import OmegaConf

        options = replace(self.options, space={one.key: str(one) for one in self.space})
        return redact(OmegaConf.to_yaml(OmegaConf.create({"sweep": options, "train": self.base})))

    def folder_name(self, number: int, *, seed: int) -> str:
        """Return the name of the folder of a trial's run."""
        return f"trial-{number:03d}" + (f"-seed-{seed}" if self.options.seeds > 1 else "")

    def run_of(self, values: Mapping[str, str], *, number: int, seed: int) -> tuple[Path, list[str]]:
        """Return the folder and the command line of a trial's run with the `seed`-th seed."""
        name = self.folder_name(number, seed=seed)
        seeds = [f"seed={self.base.seed + seed}"] if self.options.seeds > 1 else []
        ranks = self.options.processes_per_trial
        launch = ["launch=local", f"launch.processes={ranks}"] if ranks > 1 else []
        own = [f"name={self.base.name}-{name}", f"run_dir={self.folder / name}"]
        return self.folder / name, [*self._without("name"), *_as_overrides(values), *seeds, *launch, *own]

    def best_command(self, values: Mapping[str, str]) -> str:
        """Return the command that trains with a trial's values, to be copied."""
        words = ["clip-train", "train", *self._without("name"), *_as_overrides(values), f"name={self.base.name}-best"]
        return shlex.join(words)

    def _without(self, key: str) -> list[str]:
        return [one for one in self.overrides if _key(one) != key]

    def require_same(self) -> None:
        """Check that the sweep in the folder, if there is one, is this one, and write down what it is.

        Raises:
            UserError: naming every key that differs and may not.
        """
        path = self.folder / SETTINGS_NAME
        if path.exists() and (differences := changes(path.read_text("utf-8"), self.to_yaml(), may_differ=_MAY_CHANGE)):
            shown = first_of(differences, between="\n  ")
            raise UserError(f"{self.folder} is of another sweep; give a new name= or sweep.dir=:\n  {shown}")
        path.write_text(self.to_yaml(), encoding="utf-8")


def read_settings(overrides: list[str]) -> Settings:
    """Compose and check what a sweep is to do.

    Raises:
        UserError: a key, value or range is wrong, also if only a run with that value would find it.
    """
    ranges = dict(_split(one.removeprefix(SPACE_PREFIX)) for one in overrides if one.startswith(SPACE_PREFIX))
    own = [one for one in overrides if _key(one).split(".")[0] == _SECTION and not one.startswith(SPACE_PREFIX)]
    runs = [one for one in overrides if one not in own and not one.startswith(SPACE_PREFIX)]
    options = load("sweep", own).sweep
    space = parse_space(options.space, given=ranges)
    _require_free(space, runs=runs, seeds=options.seeds)
    probes = _probes(space)
    length = [value for value in probes[0] if _key(value) in LENGTHS]  # without one there is no run
    base = load("train", [*runs, *length])
    if base.launch.name != "none":
        raise UserError(
            f"launch={base.launch.name}: the sweep starts its runs; sweep.processes_per_trial= gives them ranks"
        )
    for values in probes:
        load("train", [*runs, *values])
    recipe = [one for one in runs if _key(one) != BATCH_SIZE]
    recipe_batch_size = (load("train", [*recipe, *length]) if recipe != runs else base).global_batch_size
    objective = objective_of(base, metric=options.metric)
    if options.pruner is not Pruner.none:
        require_intermediate(objective, config=base, pruner=options.pruner.value)
    return Settings(
        options=options, space=space, objective=objective, base=base, overrides=runs,
        recipe_batch_size=recipe_batch_size, folder=Path(options.dir or f"sweeps/{base.name}").expanduser(),
    )  # fmt: skip


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise UserError(f"{SPACE_PREFIX}{override} is no KEY=RANGE")
    return key, value


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _require_free(space: list[Range], *, runs: list[str], seeds: int) -> None:
    given = {_key(one): one for one in runs}
    for one in space:
        if one.key in given:
            raise UserError(f"{given[one.key]} and {SPACE_PREFIX}{one.key}={one}: give it a value or a range")
        if one.key == "seed" and seeds > 1:
            raise UserError(f"{SPACE_PREFIX}seed={one} and sweep.seeds={seeds}: the seed is varied by one of them")
    for key in ("run_dir", "resume"):
        if key in given:
            raise UserError(f"{given[key]}: each trial has a {key} of its own, in sweep.dir=FOLDER")


def _probes(space: list[Range]) -> list[list[str]]:
    """Return points at which every range takes its ends or choices, one after the other."""
    first = {one.key: one.samples[0] for one in space}
    points = [first, *(first | {one.key: sample} for one in space for sample in one.samples[1:])]
    return [_as_overrides(point) for point in points]


def _as_overrides(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]
