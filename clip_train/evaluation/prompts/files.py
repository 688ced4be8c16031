"""Class names and prompt templates, read from the data files beside this module or from the user's own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_train.errors import IntegrityError, UserError, reading

_FOLDER = Path(__file__).parent / "data"
_PLACEHOLDER = re.compile(r"\{c?\}")

# SHA-256 of the lines joined by newlines: another list would change every published number that rests on it.
_SHA256 = {
    "imagenet_classnames": "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60",
    "imagenet_templates": "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af",
    "imagenet_wnids": "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
    "imagenet_a_wnids": "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520",
    "imagenet_r_wnids": "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624",
    "imagenet_o_wnids": "39f8e64e8f89efad8fd9615c061abc61695ffbd27793e87199181cb4fb340083",
    "simple_templates": "6ef3883987d224b7949da69fe0b615af152e1560eaac4c5c38555e50c882d415",
}

SINGLE_TEMPLATE = "a photo of a {}."

Templates = Sequence[str] | Mapping[str, Sequence[str]]
"""Templates for all class names, or the finished prompts of each."""


def read_lines(path: str | Path, *, counted: bool = False) -> list[str]:
    """Return the non-empty lines of a UTF-8 text file.

    Args:
        path: the file.
        counted: the place of a line means something, so that only the last ones may be empty.

    Raises:
        UserError: the file cannot be read, holds no line, or an empty one where lines are counted.
    """
    with reading(path):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path} is empty; one entry per line is needed")
    if counted and "" in lines[: len(found)]:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; one entry per line is needed")
    return found


def imagenet_classnames() -> list[str]:
    """Return the 1000 ImageNet class names in class order. Two pairs of classes share a name: never key by it."""
    return list(_shipped("imagenet_classnames"))


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of the 1000 ImageNet classes in class order, which is their sorted order."""
    return list(_shipped("imagenet_wnids"))


def imagenet_parts() -> dict[str, list[str]]:
    """Return the ids of the published sets that have 200 of the classes, in class order, by name of the set."""
    return {f"ImageNet-{part.upper()}": list(_shipped(f"imagenet_{part}_wnids")) for part in "aro"}


def load_templates(choice: str) -> list[str]:
    """Return the templates that `choice` names: `imagenet`, `simple`, `single`, a text file, or itself if it is one.

    Raises:
        UserError: there is no such file, or a template has no placeholder.
    """
    if choice == "single":
        return [SINGLE_TEMPLATE]
    if choice in ("imagenet", "simple"):
        return list(_shipped(f"{choice}_templates"))
    if not os.path.isfile(choice):  # noqa: PTH113 a template may be too long for a path, which pathlib raises for
        if _PLACEHOLDER.search(choice):
            return [choice]
        raise UserError(
            f"templates={choice} is neither imagenet, simple, single, a file, nor a template with {{}} for the name"
        )
    templates = read_lines(choice)
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise UserError(f"{choice}: template {template!r} must contain {{}} or {{c}}")
    return templates


def load_prompts(choice: str, *, classnames: Sequence[str]) -> Templates:
    """Return what `load_templates` does or, of a `.json` file, the finished prompts of each class name.

    Raises:
        UserError: as `load_templates`; or the JSON is no object of lists of texts, or lacks one of `classnames`.
    """
    path = Path(choice)
    if path.suffix.lower() != ".json":
        return load_templates(choice)
    try:
        prompts: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"templates={choice} cannot be read as JSON: {error}") from error
    if not isinstance(prompts, dict):
        raise UserError(f"{choice} must be an object of class names, each with a list of prompts")
    for name in classnames:
        own = prompts.get(name)
        if not isinstance(own, list) or not own or not all(isinstance(prompt, str) and prompt for prompt in own):
            raise UserError(f"{choice} has no list of prompts for the class {name!r}")
    return {name: prompts[name] for name in classnames}


def fill(template: str, *, classname: str) -> str:
    """Return the prompt of one class: `{}` and `{c}` both stand for its name."""
    return _PLACEHOLDER.sub(lambda _: classname, template)


def prompts_of(classname: str, *, templates: Templates) -> list[str]:
    """Return the prompts of one class."""
    if isinstance(templates, Mapping):
        return list(templates[classname])
    return [fill(template, classname=classname) for template in templates]


def prompts_sha256(classnames: Sequence[str], *, templates: Templates) -> str:
    """Return a hash of all finished prompts, class after class: the lines joined by newlines."""
    lines = (prompt for name in classnames for prompt in prompts_of(name, templates=templates))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@functools.cache
def _shipped(name: str) -> tuple[str, ...]:
    """Read a list that came with this package.

    Raises:
        IntegrityError: it is not the published one any more.
    """
    path = _FOLDER / f"{name}.txt"
    lines = read_lines(path)
    if hashlib.sha256("\n".join(lines).encode()).hexdigest() != _SHA256[name]:
        raise IntegrityError(f"{path} is not the published list any more (SHA-256 differs): install clip-train again")
    return tuple(lines)
