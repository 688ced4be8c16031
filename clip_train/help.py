"""Help for the commands that take `KEY=VALUE`, read from the config dataclasses and their fields' docstrings."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from typing import get_args, get_type_hints

from clip_train.config_dir import config_dir
from clip_train.config_keys import groups_of, known_keys, options_of, plain_key
from clip_train.errors import UserError
from clip_train.schema import ROOTS

EXAMPLES = {
    "train": """\
  clip-train train experiment=demo                      a whole recipe (configs/experiment/demo.yaml)
  clip-train train experiment=demo steps=200 seed=1     the same with other values
  clip-train train -m experiment=demo optim.lr=1e-3,2e-3 seed=0,1          a grid: one run for each combination
  clip-train train data.train='shards/train/{000..331}.tar' model=ViT-B-32 samples=12_800_000 name=first
  clip-train train experiment=demo launch=local launch.processes=8         eight ranks on this machine
Run the same command again and it continues with the next sample.""",
    "evaluate": """\
  clip-train evaluate checkpoint=runs/demo              the evaluations that the run was trained with
  clip-train evaluate checkpoint=runs/demo evaluation=[imagenet] evaluation.imagenet.root=/data/imagenet
  clip-train evaluate checkpoint=runs/demo suite=datacomp evaluation_root=/data
  clip-train evaluate checkpoint=runs/demo reference.python=PATH    ours beside clip-benchmark's, of that Python
  clip-train evaluate checkpoint=ViT-B/32 evaluation=[imagenet] evaluation.imagenet.precision=bf16""",
    "sweep": """\
  clip-train sweep experiment=demo sweep.trials=20 "sweep.space.optim.lr=log(1e-5,1e-2)"
  clip-train sweep experiment=demo sweep.space=space.yaml sweep.metric=scenes/acc1 sweep.seeds=3
  clip-train sweep experiment=demo sweep.space=space.yaml sweep.pruner=asha evaluation.val.every=100
All keys of `clip-train train` but run_dir and resume, for its runs. Run the same command again and it goes on.""",
    "plan": """\
  clip-train plan experiment=demo                       memory, time and cost of the run; its first steps are tried
  clip-train plan experiment=demo plan.processes=2 plan.price=1.5 --json
  clip-train plan model=ViT-L-14 samples=1_000_000_000 global_batch_size=16384 plan.gpu=H100 plan.processes=64 ...
Exit code 1 if the run cannot work as it is.""",
}


def describe(command: str) -> str:
    """Return the help of a command that takes KEY=VALUE: examples, each choice, every key with its default."""
    lines = [f"usage: clip-train {command} [KEY=VALUE ...] [--cfg] [--debug]", "", EXAMPLES[command], "", "choices:"]
    for group in groups_of("train" if command == "sweep" else command):  # a sweep hands the choices on to its runs
        names = f"{group}={', '.join(options_of(group))}"
        lines.append(textwrap.fill(names, 110, initial_indent="  ", subsequent_indent="      "))
    lines += ["", "keys (clip-train help KEY explains one):"]
    for key, (schema, name) in known_keys(ROOTS[command]).items():
        if line := _line(key, schema, name):
            lines.append(f"  {line}")
    lines += ["", "  --cfg    print the resolved config and stop", "  --debug  show tracebacks"]
    if command == "train":
        lines.append("  --dry-run  print what launch= would start, and start nothing")
    if command == "plan":
        lines.append("  --json   print all numbers as JSON: bytes, seconds, FLOP")
    return "\n".join(lines)


def explain(key: str) -> str:
    """Return type, default and meaning of one config key, in each command that has one of this name.

    Raises:
        UserError: there is no such key; the nearest is named.
    """
    plain = plain_key(key)
    found: dict[str, str] = {}  # command by text
    for command, root in ROOTS.items():
        keys = known_keys(root)
        if plain in keys:
            # The keys of training are those of its plan as well, and are said once.
            found.setdefault(_explanation(plain, keys=keys), command)
    if not found:
        every = {key for root in ROOTS.values() for key in known_keys(root)}
        near = difflib.get_close_matches(plain, every, n=3, cutoff=0.4)
        raise UserError(f"unknown key '{key}'" + (f": did you mean {' or '.join(near)}?" if near else ""))
    return "\n".join(text.replace("\n", f"    (clip-train {command})\n", 1) for text, command in found.items())


def _explanation(key: str, *, keys: dict[str, tuple[type, str]]) -> str:
    schema, name = keys[key]
    text = _docstrings(schema).get(name, "")
    below = [one for one in keys if one.startswith((f"{key}.", f"{key}.NAME."))]
    if below:
        files = [f"{key}= chooses one of {', '.join(options_of(key))}"] if (config_dir() / key).is_dir() else []
        told = [text, *files, *(_line(one, *keys[one]) for one in below)]
        return f"{key}.*:\n" + textwrap.indent("\n".join(line for line in told if line), "  ")
    kind = get_type_hints(schema)[name]
    values = [v for one in (kind, *get_args(kind)) if inspect.isclass(one) and issubclass(one, StrEnum) for v in one]
    told = [text, *([f"One of {', '.join(values)}."] if values else [])]
    declared = next(item.type for item in fields(schema) if item.name == name)
    return f"{key}: {declared} = {_default(schema, name)}\n" + textwrap.indent("\n".join(told), "  ")


def _line(key: str, schema: type, name: str) -> str:
    default, text = _default(schema, name), _first_sentence(_docstrings(schema).get(name, ""))
    return f"{f'{key}={default}':<44} {text}" if default and text else ""


@functools.cache
def _docstrings(schema: type) -> dict[str, str]:
    """A string literal below a field is its docstring: Python drops it, the source keeps it."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for item, following in itertools.pairwise(body):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[item.target.id] = inspect.cleandoc(str(following.value.value))  # type: ignore[union-attr]
    return found


def _default(schema: type, name: str) -> str:
    item: Field = next(f for f in fields(schema) if f.name == name)
    if item.default is not MISSING:
        return "null" if item.default is None else str(getattr(item.default, "value", item.default))
    value = item.default_factory() if item.default_factory is not MISSING else "???"
    return str(value) if isinstance(value, (list, str)) else ""


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".")
