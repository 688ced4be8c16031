"""Every key that a config may hold, and one line that says what is wrong with an override that Hydra refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from clip_train.config_dir import config_dir
from clip_train.schema import CHOICES, ROOTS

_RECIPES = "experiment"
_SHOWN_KEYS = 3


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


def plain_key(key: str) -> str:
    """Return a key as `known_keys` lists it: the user's names of evaluations are not keys."""
    return re.sub(r"^evaluation\.[^.]+", "evaluation.NAME", key)


def groups_of(command: str) -> list[str]:
    """Return the folders of `configs/` that a command chooses files from."""
    keys = {item.name for item in fields(ROOTS[command])}
    folders = sorted(path.name for path in config_dir().iterdir() if path.is_dir())
    return [one for one in folders if one in keys or (one == _RECIPES and command != "evaluate")]


def options_of(group: str) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def explain_refusal(command: str, overrides: list[str], error: Exception) -> str:
    """Turn Hydra's message into one line that names the key and the nearest right one."""
    text = str(error) or _unreadable_file() or str(error.__cause__ or type(error).__name__)
    in_file = re.match(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text)
    if in_file:
        return _explain_file(command, *in_file.groups(), text=text)
    cause = str(error.__cause__ or "")
    parts: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _unknown(command, overrides),
        lambda: _several_values(command, text),
        lambda: _no_such_choice(text),
        lambda: _of_another_choice(text, cause),
        lambda: _wrong_value(overrides, text, cause),
        lambda: _missing(command, overrides, text),
    )
    return next((line for part in parts for line in part()), text.strip().splitlines()[0])


def _unknown(command: str, overrides: list[str]) -> Iterator[str]:
    groups, keys = groups_of(command), known_keys(ROOTS[command])
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        plain = plain_key(key)
        # `+evaluation@evaluation.mine=classify` adds an evaluation with a name of one's own.
        if plain in keys or key in groups or plain == "evaluation.NAME" or override.startswith("+evaluation@"):
            continue
        elsewhere = [other for other, root in ROOTS.items() if plain in known_keys(root)]
        if elsewhere:
            yield f"unknown key '{key}': it is one of `clip-train {elsewhere[0]}`"
            continue
        near = difflib.get_close_matches(plain, [*keys, *groups], n=1, cutoff=0.5)
        hint = near or [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
        named = hint[0].replace(".NAME", f".{key.split('.')[1]}" if "." in key else ".NAME") if hint else ""
        yield f"unknown key '{key}'" + (
            f": did you mean '{named}'?" if hint else f"; `clip-train {command} --help` lists them"
        )


def _several_values(command: str, text: str) -> Iterator[str]:
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'", text):
        grid = "; `clip-train train -m` trains with each" if command == "train" else ""
        yield f"{found[1]}: several values; a list is written KEY=[A,B], one text 'KEY=\"A,B\"'{grid}"


def _no_such_choice(text: str) -> Iterator[str]:
    if missing := re.search(r"Could not (?:find|load) '([\w-]+)/([^']+)'", text):
        group, value = missing.groups()
        options = options_of(group)
        similar = difflib.get_close_matches(value, options, n=1, cutoff=0.3)
        question = f"did you mean {similar[0]}? " if similar else ""
        yield f"{group}={value} is not there: {question}choose one of {', '.join(options)}"
    if twice := re.match(r"Multiple values for ([\w-]+)\.|([\w-]+) appears more than once", text):
        yield f"+{twice[1] or twice[2]}=: it is there already; leave out the +"
    if there := re.match(r"Could not append to config. An item is already at '(\S+)'", text):
        yield f"+{there[1]}=: it is there already; leave out the +"
    if kept := re.match(r"Error merging override ~(\S+)|Could not delete '(\S+)'\.", text):
        yield f"~{kept[1] or kept[2]}: only evaluations can be taken away, as in ~evaluation.NAME"


def _of_another_choice(text: str, cause: str) -> Iterator[str]:
    """A key that is known, but not to what was chosen: `launch.processes` without `launch=local`."""
    found = re.match(r"Could not override '([^']+)'", text)
    if not found:
        return
    group, *rest = found[1].split(".")
    choices = CHOICES.get(group, {})
    if group == "evaluation" and "not in struct" in cause:
        yield f"{found[1]}: {rest[0]} is not among the evaluations; +evaluation=[{rest[0]}] would add it"
    elif group == "evaluation":
        kind = next((name for name, schema in choices.items() if f"'{schema.__name__}'" in cause), "another")
        yield f"{found[1]}: {rest[0]} is of the kind {kind}, which has no {'.'.join(rest[1:])}"
    elif fitting := [f"{group}={name}" for name, schema in choices.items() if ".".join(rest) in known_keys(schema)]:
        yield f"{found[1]} is a key of {' or '.join(fitting)} only"


def _wrong_value(overrides: list[str], text: str, cause: str) -> Iterator[str]:
    merging = re.search(r"Error merging override (\S+?)=", text)
    if not merging or not cause:
        return
    key, first = merging[1], cause.splitlines()[0]
    given = next((one.partition("=")[2] for one in reversed(overrides) if one.lstrip("+").startswith(f"{key}=")), "")
    if "is not a subclass of" in first:
        below = [one for root in ROOTS.values() for one in known_keys(root) if one.startswith(f"{plain_key(key)}.")]
        yield f"{key}={given}: {key} has keys of its own: {', '.join(below[:_SHOWN_KEYS])} …"
    if "'float' could not be converted to Integer" in first:
        whole = float(given).is_integer()
        yield f"{key}={given} must be a whole number" + (f": write {key}={int(float(given))}" if whole else "")
    yield f"{key}: {first}"


def _missing(command: str, overrides: list[str], text: str) -> Iterator[str]:
    first = text.strip().splitlines()[0]
    full_key = re.search(r"full_key: (\S+)", text)
    if not full_key:
        return
    key = full_key[1]
    if "missing mandatory value" in text:
        yield f"{key}= is required; `clip-train help {plain_key(key)}` says what it is"
    if absent := re.match(r"Interpolation key '(\S+)' not found", first):
        if any(one.lstrip("+").startswith(f"{key}=") for one in overrides):
            yield f"{key}: there is no key {absent[1]}"
        # What training takes from its data, another command has to be told.
        yield f"{key}= is required: `clip-train {command}` has no {absent[1]} to take it from"
    yield f"{key}: {first}"


def _explain_file(command: str, name: str, problem: str, *, text: str) -> str:
    """Say what is wrong in a YAML file under `configs/`."""
    found = re.search(r"full_key: (\S+)", text)
    key = found[1] if found else ""
    if name.startswith(f"{key}/") and "not in" in problem:
        return f"{name}.yaml: its first line must be `# @package _global_`, and keys must follow"
    if not problem.startswith("Key "):
        return f"{name}.yaml: {key}: {problem}"
    near = difflib.get_close_matches(plain_key(key), known_keys(ROOTS[command]), n=1, cutoff=0.5)
    return f"{name}.yaml: unknown key '{key}'" + (f": did you mean '{near[0]}'?" if near else "")


def _unreadable_file() -> str:
    """Name the file with an interpolation that cannot be read: of these Hydra says nothing at all."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    for path in sorted(config_dir().rglob("*.yaml")):
        try:
            OmegaConf.load(path)
        except GrammarParseError as error:
            return f"{path.relative_to(config_dir())}: {error.full_key}: {str(error).splitlines()[0]}"
        except Exception:  # another file's trouble, of which Hydra has more to say
            continue
    return ""


def _classes_of(group: str, hint: Any) -> list[type]:
    if group in CHOICES:
        return list(CHOICES[group].values())
    return [t for t in (hint, *get_args(hint)) if is_dataclass(t) and isinstance(t, type)]
