"""Compose a run's config from YAML and the command line with Hydra, check it, write it and read it back.

YAML under `configs/` holds values; the dataclasses of clip_train/schema.py hold types, units and rules.
"""

from __future__ import annotations

import functools
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from clip_train.config_dir import config_dir
from clip_train.config_keys import explain_refusal, groups_of, options_of
from clip_train.errors import UserError, reading
from clip_train.evaluation.config import naming
from clip_train.overrides import readable, refuse_code_and_secrets
from clip_train.redact import redact
from clip_train.schema import CHOICES, MAY_CHANGE_ON_RESUME, NAMED, ROOTS, TrainConfig


def load(command: str, overrides: list[str]) -> Any:
    """Compose `configs/COMMAND.yaml` with Hydra `overrides` and return its checked dataclass.

    Raises:
        UserError: an unknown key (the nearest right one is named), a wrong type or a broken rule.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = _to_object(compose(command, overrides))
    except (OmegaConfBaseException, AttributeError) as error:  # the latter where `+key=` adds what no dataclass has
        raise UserError(explain_refusal(command, overrides, error)) from error
    _refuse_unasked_pipes(config, overrides)
    return config


def compose(command: str, overrides: list[str]) -> Any:
    """Compose `configs/COMMAND.yaml` with Hydra `overrides`; the unresolved OmegaConf node.

    Raises:
        UserError: as `load`, as far as composing shows it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    groups = groups_of(command)
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_code_and_secrets(key, value)
        _refuse_no_choice(key, value, groups=groups)
    overrides = readable(overrides)
    register()
    try:
        with initialize_config_dir(config_dir=str(config_dir().resolve()), version_base="1.3"):
            composed = hydra_compose(command, overrides)
    except YAMLError as error:
        marked = error if isinstance(error, MarkedYAMLError) else None
        where = marked.problem_mark if marked else None
        problem = marked.problem if marked else str(error).splitlines()[0]
        place = f"{where.name} line {where.line + 1}" if where else f"a recipe of {' '.join(overrides)}"
        raise UserError(f"{place}: {problem}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain_refusal(command, overrides, error)) from error
    _refuse_what_is_not_to_be_saved(composed)
    return composed


@functools.cache  # once: building the schemas takes as long as composing a config of them
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
    """Return a dataclass config as YAML that `from_yaml` reads back; signatures in URLs are left out."""
    from omegaconf import OmegaConf

    return redact(OmegaConf.to_yaml(OmegaConf.structured(config)))


def from_yaml(path: Path, *, root: type = TrainConfig) -> Any:
    """Read a config that `to_yaml` wrote.

    Raises:
        UserError: the file is missing, is not YAML, or holds a key or value that this version does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = read_yaml(path)
    try:
        schema = OmegaConf.structured(root)
        for group in (g for g in NAMED if g in values):
            schema[group] = OmegaConf.structured(_choice(group, values[group].get("name"), path))
        for name, evaluation in values.get("evaluation", {}).items():
            schema.evaluation[name] = OmegaConf.structured(_choice("evaluation", evaluation.get("name"), path))
        return _to_object(OmegaConf.merge(schema, values))
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _to_object(config: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for name, evaluation in config.evaluation.items() if "evaluation" in config else ():
        with naming(name), suppress(OmegaConfBaseException):  # which names the key itself when all is made
            OmegaConf.to_object(evaluation)
    return OmegaConf.to_object(config)


def parse_yaml(text: str, *, origin: str) -> Any:
    """Return a mapping in YAML as an OmegaConf node; nothing in it is run.

    Raises:
        UserError: it is something else.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{origin} is no config: {str(error).splitlines()[0]}") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"{origin} is no config: it holds no keys with values")
    return values


def read_yaml(path: Path) -> Any:
    """Return a file with a mapping in YAML as an OmegaConf node; nothing in it is run.

    Raises:
        UserError: the file cannot be read, or is something else.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
    return parse_yaml(text, origin=str(path))


def flat_values(node: Any) -> dict[str, Any]:
    """Return the values of a config by dotted key, unresolved."""
    from omegaconf import OmegaConf

    return flatten(OmegaConf.to_container(node, resolve=False))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; an empty mapping below is a value."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix.rstrip("."): tree}
    return {key: value for name, below in tree.items() for key, value in flatten(below, f"{prefix}{name}.").items()}


def changes(old: str, new: str, *, may_differ: tuple[str, ...] = MAY_CHANGE_ON_RESUME) -> list[str]:
    """Return `key: old -> new` for every key that differs between two `to_yaml` texts and may not, as on resume.

    Raises:
        UserError: the old one is no config.
    """
    before, after = (flat_values(parse_yaml(text, origin="the run's config.yaml")) for text in (old, new))
    free = tuple(key + "." for key in may_differ)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent") and not (key + ".").startswith(free)
    ]


def _choice(group: str, name: str | None, path: Path) -> type:
    if name not in CHOICES[group]:
        raise UserError(f"{path}: {group}.name={name} is not one of {', '.join(CHOICES[group])}")
    return CHOICES[group][name]


def _refuse_no_choice(key: str, value: str, *, groups: list[str]) -> None:
    """Hydra itself merges a list of files into one another, says nothing of its own keys, and fails at null."""
    if re.match(r"\+*hydra\W", key):
        raise UserError(f"{key}: Hydra's own keys have no effect here; run_dir= says where the run goes")
    if key not in groups:
        return
    if value in ("", "null"):
        none = ", or [] for none" if key == "evaluation" else ""
        raise UserError(f"{key}={value}: choose one of {', '.join(options_of(key))}{none}")
    if value.startswith("[") and key not in ("evaluation", "experiment"):
        raise UserError(f"{key}={value}: choose one file, not a list")


def _refuse_unasked_pipes(config: Any, overrides: list[str]) -> None:
    """A recipe that someone else wrote must not run commands: only who starts the run can allow it."""
    asked = any(override.lstrip("+").partition("=")[0] == "data.allow_pipe" for override in overrides)
    if isinstance(config, TrainConfig) and config.data.allow_pipe and not asked:
        raise UserError("data.allow_pipe=true counts on the command line only, not in a recipe")


def _refuse_what_is_not_to_be_saved(composed: Any) -> None:
    """A run saves its config: what stands in the environment, a password perhaps, must not land there."""
    for key, value in flat_values(composed).items():
        refuse_code_and_secrets(key, str(value))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: numbers must be finite")
        if isinstance(value, str) and "${now:" in value:
            raise UserError(
                f"{key}={value}: each rank reads its own clock, and the same command would not find the run again; let "
                "the shell write the date, as in name=run-$(date +%F)"
            )
        if isinstance(value, str) and "${oc.env" in value:
            raise UserError(f"{key}={value}: a config does not read the environment; let the shell expand $NAME")
