"""Where a named model is: `CLIP_TRAIN_WEIGHTS`, the hub's cache, or the hub."""

from __future__ import annotations

import os
from pathlib import Path

from clip_train.errors import UserError
from clip_train.interop.open_clip import CONFIG_FILE, WEIGHT_FILES

WEIGHTS_VARIABLE = "CLIP_TRAIN_WEIGHTS"
HUB_PREFIX = "hf-hub:"
OPENAI_REPOSITORIES = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}


def local_weights(name: str) -> Path | None:
    """Return the folder or file under `CLIP_TRAIN_WEIGHTS` named like the model, slashes as dashes, or None."""
    root = os.environ.get(WEIGHTS_VARIABLE)
    if not root:
        return None
    stem = name.removeprefix(HUB_PREFIX).replace("/", "-")
    candidates = (Path(root) / f"{stem}{suffix}" for suffix in ("", ".pt", ".safetensors"))
    return next((path for path in candidates if path.exists()), None)


def fetch(repository: str, *, wanted: str, cache_dir: str | None) -> Path:
    """Return the local folder of `ORG/NAME[@revision]` with its config and weights, downloading what is missing.

    Args:
        repository: the hub's name, with an optional revision.
        wanted: what the user asked for, for the message.
        cache_dir: the hub's cache folder; its default if None.

    Raises:
        UserError: not there, or not reachable and not in the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = repository.partition("@")
    try:
        config = hf_hub_download(repository, CONFIG_FILE, revision=revision or None, cache_dir=cache_dir)
        for name in WEIGHT_FILES:
            try:
                hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir)
                break
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue  # the repository keeps its weights under a later name
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{wanted}: {CONFIG_FILE} and weights of {repository} are neither in the hub's cache nor downloadable "
            f"({type(error).__name__}), and {WEIGHTS_VARIABLE}={os.environ.get(WEIGHTS_VARIABLE, '')} has no such "
            f"folder. Copy a model folder here and pass its path, set {WEIGHTS_VARIABLE} to the folder that holds "
            "it, or call create_model for random weights"
        ) from error
    return Path(config).parent
