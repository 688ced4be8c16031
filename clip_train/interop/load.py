"""`clip_train.load`: a model from a run, a checkpoint, a file or folder of another library, or a name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clip_train.errors import UserError
from clip_train.interop.hub import HUB_PREFIX, OPENAI_REPOSITORIES, fetch, local_weights
from clip_train.interop.loaded_model import LoadedModel, Preprocess
from clip_train.interop.open_clip import CONFIG_FILE, find_weights, read_config
from clip_train.interop.weights import assign_weights, openai_config, read_weights, take_openai_integers
from clip_train.model.config import ModelConfig
from clip_train.model.zoo import available_models, model_config
from clip_train.tokenizer.config import TOKENIZERS, TokenizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.tokenizer.base import Tokenizer

WEIGHT_CHOICES = ("auto", "ema", "raw")
RUN_CONFIG_FILE = "config.yaml"


class Source(NamedTuple):
    """An architecture, its weights under native names, where they came from, and the tokenizer if not CLIP's."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: Path
    tokenizer: Tokenizer | None = None


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    weights: str = "auto",
    dtype: torch.dtype | None = None,
    model: str | None = None,
) -> tuple[LoadedModel, Preprocess]:
    """Load a trained model and the preprocessing of its images; the order of arguments is OpenAI CLIP's.

    Args:
        name_or_path: a run directory, a checkpoint, a folder with `open_clip_config.json`, a weight file (OpenAI's
            archives, `.pt`, `.safetensors`), `hf-hub:ORG/NAME[@revision]`, or one of OpenAI's names (`ViT-B/32`).
        device: CUDA if there is one, else the CPU, if None.
        jit: exists for compatibility and must be False.
        download_root: cache folder of the hub; its default if None.
        weights: of a run: `ema` (moving average), `raw`, or `auto`, the average if the run kept one.
        dtype: of the parameters; float32 if None.
        model: the architecture's name, for a weight file that does not tell (see `available_models`).

    Returns:
        The model in eval mode, and a function from a PIL image to float32 [3, S, S].

    Raises:
        UserError: nothing usable is there. Random weights are never returned.
        IntegrityError: the checkpoint is damaged.
    """
    if jit:
        raise UserError("jit=True: there is no scripted variant, pass jit=False")
    source = read_source(name_or_path, weights=weights, model=model, cache_dir=download_root)
    with torch.device("meta"):
        loaded = LoadedModel(source.config, tokenizer=source.tokenizer)
    assign_weights(loaded, source.tensors, origin=str(source.origin))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return loaded.to(device=device, dtype=dtype).eval(), Preprocess(source.config)


def read_source(
    name_or_path: str | Path, *, weights: str = "auto", model: str | None = None, cache_dir: str | None = None
) -> Source:
    """Find and read what `load` would load, without building the model. The arguments are those of `load`."""
    if weights not in WEIGHT_CHOICES:
        raise UserError(f"weights={weights!r} must be one of {', '.join(WEIGHT_CHOICES)}")
    path = _locate(str(name_or_path), cache_dir=cache_dir)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            file = find_weights(path)
            return Source(read_config(path / CONFIG_FILE), read_weights(file), file)
        return _read_run(path, weights=weights)
    tensors = read_weights(path)
    if take_openai_integers(tensors):
        return Source(openai_config(tensors, name=model or path.stem), tensors, path)
    if model is None:
        raise UserError(f"{path}: the file does not tell its architecture; pass model=NAME (see available_models())")
    return Source(model_config(model), tensors, path)


def _locate(name: str, *, cache_dir: str | None) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(HUB_PREFIX):
        return local_weights(name) or fetch(name.removeprefix(HUB_PREFIX), wanted=name, cache_dir=cache_dir)
    if name in available_models() and (local := local_weights(name)):
        return local
    if name in OPENAI_REPOSITORIES:
        return fetch(OPENAI_REPOSITORIES[name], wanted=name, cache_dir=cache_dir)
    if name in available_models():
        raise UserError(f"{name} names an architecture, not weights: load a run or a file, or call create_model")
    near = ", ".join(difflib.get_close_matches(name, OPENAI_REPOSITORIES, n=3, cutoff=0.0))
    raise UserError(f"{name}: neither a path nor a model with published weights; the nearest names are {near}")


def _read_run(path: Path, *, weights: str) -> Source:
    """Read a run directory's newest intact checkpoint, or the checkpoint itself."""
    from clip_train.checkpoint.load import find_checkpoint, load_tensors

    checkpoint = find_checkpoint(path)
    has_average = (checkpoint / "ema.safetensors").is_file()
    if weights == "ema" and not has_average:
        raise UserError(f"{checkpoint}: weights=ema, but the run keeps no moving average (optim.ema_decay)")
    part = "ema" if has_average and weights != "raw" else "model"
    config, tokenizer = _run_config(checkpoint / RUN_CONFIG_FILE)
    built = tokenizer.build(context_length=config.text.context_length, kept_in=checkpoint)
    return Source(config, load_tensors(checkpoint, part), checkpoint, built)


def _run_config(path: Path) -> tuple[ModelConfig, TokenizerConfig]:
    try:
        values = cast("DictConfig", OmegaConf.load(path))
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"])
        chosen = values.get("tokenizer", {"name": "clip"})
        tokenizer = OmegaConf.merge(OmegaConf.structured(TOKENIZERS[chosen["name"]]), chosen)
        return cast("ModelConfig", OmegaConf.to_object(merged)), cast("TokenizerConfig", OmegaConf.to_object(tokenizer))
    except (OSError, KeyError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not the config of a run ({str(error).splitlines()[0]})") from error
