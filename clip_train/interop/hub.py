"""Where a named model is: `CLIP_TRAIN_WEIGHTS`, the hub's cache, or the hub."""

from __future__ import annotations

import difflib
import json
import os
from functools import cache
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from clip_train.errors import UserError
from clip_train.interop import open_clip
from clip_train.interop.folders import (
    EXPORT_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILES,
    TRANSFORMERS_CONFIG_FILE,
    TRANSFORMERS_WEIGHT_FILES,
)
from clip_train.model.zoo import OPENAI_NAMES, available_models

WEIGHTS_VARIABLE = "CLIP_TRAIN_WEIGHTS"
HUB_PREFIX = "hf-hub:"
PRETRAINED_FILE = Path(__file__).parent / "data" / "pretrained.yaml"
QUICK_GELU_SUFFIX = "-quickgelu"
# A repository's config, in the order that `read_folder` looks for it, and the weights that go with it.
_LAYOUTS = {
    EXPORT_FILE: open_clip.WEIGHT_FILES,
    open_clip.CONFIG_FILE: open_clip.WEIGHT_FILES,
    TRANSFORMERS_CONFIG_FILE: TRANSFORMERS_WEIGHT_FILES,
}


@cache
def pretrained_weights() -> dict[str, str]:
    """Return the hub's repository of each `ARCHITECTURE:TAG`; architectures are spelled with dashes."""
    table = cast("dict[str, dict[str, str]]", OmegaConf.to_container(OmegaConf.load(PRETRAINED_FILE)))
    return {f"{row}:{tag}": repository for row, tags in table.items() for tag, repository in tags.items()}


def locate(name: str, *, cache_dir: str | None) -> Path:
    """Return the file or folder that a path or name stands for, downloaded if need be.

    The order is: an existing path, `CLIP_TRAIN_WEIGHTS`, the hub's cache, the hub.

    Raises:
        UserError: there is nothing, or it cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # longer than a path may be, or with a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name[:60]!r}… is neither a path nor a name: {reason}") from error
    if name.startswith(HUB_PREFIX):
        return local_weights(name) or fetch(name.removeprefix(HUB_PREFIX), wanted=name, cache_dir=cache_dir)
    published = pretrained_weights()
    if (name in available_models() or name in published) and (local := local_weights(name)):
        return local
    if name in OPENAI_NAMES:
        row = OPENAI_NAMES[name].removesuffix(QUICK_GELU_SUFFIX) + QUICK_GELU_SUFFIX
        return fetch(published[f"{row}:openai"], wanted=name, cache_dir=cache_dir)
    if name in published:
        return fetch(published[name], wanted=name, cache_dir=cache_dir)
    raise UserError(_unknown(name))


def named_file(name: str) -> tuple[str, Path] | None:
    """Return the parts of `ARCHITECTURE:FILE`, None for any other name or path.

    Raises:
        UserError: a folder stands for the file, and a folder tells its architecture.
    """
    architecture, _, rest = name.partition(":")
    if architecture not in available_models() or name in pretrained_weights() or Path(name).exists():
        return None
    path = Path(rest).expanduser()
    if rest and path.is_dir():
        raise UserError(f"{name}: a folder tells its architecture itself; load {rest}")
    return (architecture, path) if path.is_file() else None


def recorded_activation(name: str) -> bool | None:
    """Say whether the name promises QuickGELU (True) or GELU (False); None for paths and `hf-hub:` names."""
    if name in pretrained_weights():
        return name.partition(":")[0].endswith(QUICK_GELU_SUFFIX)
    return True if name in OPENAI_NAMES else None


def local_weights(name: str) -> Path | None:
    """Return the folder or file under `CLIP_TRAIN_WEIGHTS` named like the model, `/` and `:` as dashes, or None."""
    root = os.environ.get(WEIGHTS_VARIABLE)
    if not root:
        return None
    stem = name.removeprefix(HUB_PREFIX).replace("/", "-").replace(":", "-")
    candidates = (Path(root) / f"{stem}{suffix}" for suffix in ("", ".pt", ".safetensors"))
    return next((path for path in candidates if path.exists()), None)


def fetch(repository: str, *, wanted: str, cache_dir: str | None) -> Path:
    """Return the local folder of `ORG/NAME[@revision]` with its config and weights, downloading what is missing.

    Of several processes that share the cache one downloads a file and the others wait for it (the hub's client locks
    each file). All files are of one commit, whose hash is the folder's name.

    Args:
        repository: the hub's name, with an optional revision.
        wanted: what the user asked for, for the message.
        cache_dir: the hub's cache folder; its default if None.

    Raises:
        UserError: not there, or not reachable and not in the cache.
    """
    from huggingface_hub import constants

    name, _, revision = repository.partition("@")
    why = "HF_HUB_OFFLINE is set"
    cause = None
    try:
        cached = _Repository(name, revision=revision or None, cache_dir=cache_dir, cached=True).collect()
        if cached is not None:
            return cached
        if not constants.HF_HUB_OFFLINE:
            found = _Repository(name, revision=revision or None, cache_dir=cache_dir, cached=False).collect()
            if found is not None:
                return found
            why = "the repository has no such files"
    except Exception as error:  # of the hub's client, whose HTTP library and errors differ between versions
        why, cause = type(error).__name__ + login_hint(error), error
    raise UserError(
        f"{wanted}: config ({', '.join(_LAYOUTS)}) and weights of {repository} are neither in the hub's cache "
        f"({cache_dir or 'its default folder'}) nor downloadable ({why}), and "
        f"{WEIGHTS_VARIABLE}={os.environ.get(WEIGHTS_VARIABLE, '')} has no such folder. Copy a model folder here and "
        f"pass its path, set {WEIGHTS_VARIABLE} to the folder that holds it, or call create_model for random weights"
    ) from cause


def login_hint(error: Exception) -> str:
    """Return what to do about an answer of the hub that asks who is there; empty for other errors."""
    response = getattr(error, "response", None)
    known = getattr(response, "status_code", None) not in (401, 403)
    return "" if known else ": absent, or private or gated, which needs HF_TOKEN or `hf auth login`"


class _Repository:
    """One commit of a repository, in the hub's cache or on the hub: the first file decides which."""

    def __init__(self, name: str, *, revision: str | None, cache_dir: str | None, cached: bool) -> None:
        self.name = name
        self.revision = revision
        self.cache_dir = cache_dir
        self.cached = cached

    def collect(self) -> Path | None:
        """Return the folder with config and weights, the latter last: what is cached is then whole."""
        for config, weight_files in _LAYOUTS.items():
            if self.get(config) is None:
                continue
            for file in (PREPROCESSOR_FILE, *TOKENIZER_FILES):
                self.get(file)
            found = next((path for file in weight_files if (path := self.get(file)) is not None), None)
            if found is None:
                return None
            if found.suffix == ".json":
                shards = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
                if None in [self.get(shard) for shard in sorted(shards)]:
                    return None
            return found.parent
        return None

    def get(self, file: str) -> Path | None:
        """Return the local path of a file, None if there is none."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            if not self.cached:  # says at once what cannot be reached; a download would try for half a minute
                get_hf_file_metadata(hf_hub_url(self.name, file, revision=self.revision))
            path = hf_hub_download(
                self.name, file, revision=self.revision, cache_dir=self.cache_dir, local_files_only=self.cached
            )
        except LocalEntryNotFoundError:
            if self.cached:
                return None
            raise
        except EntryNotFoundError:
            return None
        self.revision = Path(path).parent.name
        return Path(path)


def _unknown(name: str) -> str:
    published = pretrained_weights()
    given, _, rest = name.partition(":")
    architecture = OPENAI_NAMES.get(given, given)
    twins = {architecture.removesuffix(QUICK_GELU_SUFFIX) + suffix for suffix in ("", QUICK_GELU_SUFFIX)}
    tagged = [other for other in published if other.partition(":")[0] in twins]
    if name in available_models():
        listed = f"; published weights: {', '.join(tagged[:10])}" if tagged else ""
        return f"{name} names an architecture, not weights: load a run, {name}:FILE, or call create_model{listed}"
    if given in available_models():
        near = _near_paths(rest) or difflib.get_close_matches(name, tagged, 10, 0.0)
        hint = f"near it are {', '.join(near)}" if near else "there is no such file"
        return f"{name}: neither a file nor published weights; {hint}"
    if rest and Path(rest).expanduser().is_file():
        near = difflib.get_close_matches(given, available_models(), n=3, cutoff=0.0)
        return f"{name}: no architecture is named {given!r}; the nearest names are {', '.join(near)}"
    near = _near_paths(name) or difflib.get_close_matches(name, [*OPENAI_NAMES, *published], n=3)
    hint = f"the nearest names are {', '.join(near)}" if near else "available_models() lists the names"
    return f"{name}: neither a path nor a model with published weights; {hint}"


def _near_paths(name: str) -> list[str]:
    """Return what lies beside a path that is not there under names like it."""
    path = Path(name).expanduser()
    if path.parent == path or not path.parent.is_dir() or len(path.parts) < 2:
        return []
    beside = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=3)
    return [str(path.parent / other) for other in beside]
