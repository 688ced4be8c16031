"""Model folders by what they hold: our runs and exports, open_clip's folders, transformers' folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clip_train.calibration import CALIBRATION_FILE, Calibration, calibration_from_json, read_calibration
from clip_train.errors import UserError
from clip_train.interop import open_clip, transformers
from clip_train.interop.tokenizers import read_tokenizer
from clip_train.interop.weights import read_tensors, read_weights
from clip_train.model.adapters import Adapters, split_adapters
from clip_train.model.config import LoraConfig, ModelConfig
from clip_train.tokenizer.config import TOKENIZERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from clip_train.tokenizer.base import Tokenizer
    from clip_train.tokenizer.config import TokenizerConfig

WEIGHT_CHOICES = ("auto", "ema", "raw", "best")
RUN_CONFIG_FILE = "config.yaml"
EXPORT_FILE = "clip_train.json"
TRANSFORMERS_CONFIG_FILE = "config.json"
CONFIG_FILES = (EXPORT_FILE, open_clip.CONFIG_FILE, TRANSFORMERS_CONFIG_FILE, RUN_CONFIG_FILE)
PREPROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TRANSFORMERS_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class Source(NamedTuple):
    """An architecture, its weights under native names, where they came from, the tokenizer if not CLIP's, what is
    known of their confidence, if it is of these very weights, and the adapters of a run, which the weights include."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: Path
    tokenizer: Tokenizer | None = None
    calibration: Calibration | None = None
    adapters: Adapters | None = None


def read_folder(folder: Path, *, weights: str) -> Source:
    """Read a model folder; `weights` chooses among those of a run, see `load`.

    Raises:
        UserError: nothing known is there, or a part of it is missing, damaged, or without counterpart here.
        IntegrityError: the checkpoint of a run is damaged.
    """
    if (folder / EXPORT_FILE).is_file():
        return _read_export(folder)
    if (folder / open_clip.CONFIG_FILE).is_file():
        return _read_open_clip(folder)
    if (folder / TRANSFORMERS_CONFIG_FILE).is_file():
        return _read_transformers(folder)
    if (folder / "checkpoints").is_dir() or (folder / RUN_CONFIG_FILE).is_file() or folder.name.startswith("step-"):
        return _read_run(folder, weights=weights)
    if folder.name == "checkpoints":
        raise UserError(f"{folder}: load the run, {folder.parent}, or one of its checkpoints")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(
        f"{folder}: neither a run or checkpoint nor a folder with {EXPORT_FILE}, {open_clip.CONFIG_FILE} or "
        f"{TRANSFORMERS_CONFIG_FILE}; it has {found}"
    )


def read_folder_calibration(folder: Path) -> Calibration | None:
    """Return the calibration that a run or an export keeps, None if it keeps none.

    Raises:
        IntegrityError: it is damaged.
    """
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    kept = read_calibration(run / CALIBRATION_FILE)
    if kept is not None or not (folder / EXPORT_FILE).is_file():
        return kept
    content = read_json(folder / EXPORT_FILE).get("calibration")
    return None if content is None else calibration_from_json(content, origin=str(folder / EXPORT_FILE))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object")
    return values


def _read_export(folder: Path) -> Source:
    path = folder / EXPORT_FILE
    values = read_json(path)
    file = open_clip.find_weights(folder)
    config = _model_config(values, path=path)
    tokenizer = _tokenizer(values, path=path, context_length=config.text.context_length)
    return Source(config, read_weights(file), file, tokenizer)


def _read_open_clip(folder: Path) -> Source:
    config = open_clip.read_config(folder / open_clip.CONFIG_FILE)
    file = open_clip.find_weights(folder)
    cleaning = open_clip.read_cleaning(folder / open_clip.CONFIG_FILE)
    tokenizer = read_tokenizer(folder, text=config.text, cleaning=cleaning or "lower", is_clips=cleaning is None)
    return Source(config, read_weights(file), file, tokenizer)


def _read_transformers(folder: Path) -> Source:
    path = folder / TRANSFORMERS_CONFIG_FILE
    values = read_json(path)
    if values.get("model_type") not in transformers.MODEL_TYPES:
        known = " or ".join(transformers.MODEL_TYPES)
        raise UserError(f"{path}: model_type={values.get('model_type')!r} must be {known}")
    preprocessor = folder / PREPROCESSOR_FILE
    preprocess = read_json(preprocessor) if preprocessor.is_file() else {}
    try:
        config = transformers.read_config(values, name=folder.name, origin=str(path), preprocess=preprocess)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a config of transformers ({type(error).__name__}: {error})") from error
    file = next((folder / name for name in TRANSFORMERS_WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has {path.name} but none of {', '.join(TRANSFORMERS_WEIGHT_FILES)}")
    tensors = _read_shards(file) if file.suffix == ".json" else read_tensors(file)
    is_siglip = values["model_type"] == "siglip"
    tokenizer = read_tokenizer(
        folder, text=config.text, cleaning="canonicalize" if is_siglip else "none", is_clips=not is_siglip
    )
    return Source(config, transformers.to_native(tensors, config), file, tokenizer)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files that `model.safetensors.index.json` spreads the tensors over."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not a .safetensors file of this folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: {name} is not there")
        tensors |= read_tensors(index.parent / name)
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(f"{index}: {len(lost)} tensors are in none of its files: {', '.join(lost[:10])}")
    return tensors


def _read_run(path: Path, *, weights: str) -> Source:
    """Read a run directory's newest intact or best checkpoint, or the checkpoint itself."""
    from clip_train.checkpoint.best import best_checkpoint
    from clip_train.checkpoint.load import find_checkpoint, load_tensors

    checkpoint = find_checkpoint(best_checkpoint(path) if weights == "best" else path)
    part = "ema" if is_average(checkpoint, weights=weights) else "model"
    values = _read_yaml(checkpoint / RUN_CONFIG_FILE)
    config = _model_config(values, path=checkpoint / RUN_CONFIG_FILE)
    tokenizer = _tokenizer(values, path=checkpoint / RUN_CONFIG_FILE, context_length=config.text.context_length)
    tensors, adapters = split_adapters(load_tensors(checkpoint, part), config=config.lora)
    merged = adapters.merged_into(tensors) if adapters else tensors
    unadapted = dataclasses.replace(config, lora=LoraConfig())
    return Source(unadapted, merged, checkpoint, tokenizer, adapters=adapters)


def is_average(checkpoint: Path, *, weights: str) -> bool:
    """Return whether `weights` of a run's checkpoint are the moving average.

    Raises:
        UserError: they should be, but the run keeps none.
    """
    from clip_train.checkpoint.best import read_best
    from clip_train.checkpoint.tensors import has_part

    has_average = has_part(checkpoint, "ema")
    if weights == "ema" and not has_average:
        raise UserError(f"{checkpoint}: weights=ema, but the run keeps no moving average (optim.ema_decay)")
    if weights == "best" and (best := read_best(checkpoint.parent.parent)) is not None:
        return has_average and best.averaged
    return has_average and weights != "raw"


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        return cast("DictConfig", OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: not the config of a run ({str(error).splitlines()[0]})") from error


def _model_config(values: Mapping[Any, Any], *, path: Path) -> ModelConfig:
    """Return the section `model` of a run's or an export's config."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"])
        return cast("ModelConfig", OmegaConf.to_object(merged))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: its `model` is not an architecture ({str(error).splitlines()[0]})") from error


def _tokenizer(values: Mapping[Any, Any], *, path: Path, context_length: int) -> Tokenizer:
    """Return the tokenizer of a run's or an export's config; its files lie beside the config."""
    try:
        chosen = values.get("tokenizer", {"name": "clip"})
        merged = OmegaConf.merge(OmegaConf.structured(TOKENIZERS[chosen["name"]]), chosen)
        config = cast("TokenizerConfig", OmegaConf.to_object(merged))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: its `tokenizer` is none ({str(error).splitlines()[0]})") from error
    return config.build(context_length=context_length, kept_in=path.parent)
