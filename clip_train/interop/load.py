"""`clip_train.load`: a model from a run, a checkpoint, a file or folder of another library, or a name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_train.errors import UserError, first_of
from clip_train.interop import open_clip, openai
from clip_train.interop.folders import CONFIG_FILES, WEIGHT_CHOICES, Source, read_folder, read_folder_calibration
from clip_train.interop.hub import locate, named_file, recorded_activation
from clip_train.interop.loaded_model import LoadedModel, empty_model
from clip_train.interop.pictures import Preprocess
from clip_train.interop.weights import assign_weights, read_weights, weights_sha256
from clip_train.model.positions import resize_positions
from clip_train.model.zoo import model_config

if TYPE_CHECKING:
    from clip_train.calibration import Calibration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    weights: str = "auto",
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
    compile: bool = False,
) -> tuple[LoadedModel, Preprocess]:
    """Load a trained model and the preprocessing of its images; the order of arguments is OpenAI CLIP's.

    Args:
        name_or_path: a run directory, a checkpoint, an export; a folder of open_clip or transformers; OpenAI's archive;
            an architecture with a weight file (`ViT-B-32:weights.pt`, `.safetensors`) or with the tag of its published
            weights (`ViT-B-32:laion2b_s34b_b79k`); one of OpenAI's names (`ViT-B/32`); `hf-hub:ORG/NAME[@revision]`.
        device: CUDA if there is one, else the CPU, if None.
        jit: exists for compatibility and must be False.
        download_root: cache folder of the hub; its default if None.
        weights: of a run: `ema` (moving average), `raw`, `auto` (the average if the run kept one), or `best` (of the
            checkpoint that `checkpoint.best` kept, the weights that its metric was measured on).
        dtype: of the parameters, as a type or `fp32`, `bf16`, `fp16`; float32 if None.
        image_size: side of the pictures in pixels; the position table is interpolated to it. The model's own if None.
        compile: compile each transformer block with torch.compile, which takes minutes at the first calls.

    Returns:
        The model in eval mode, and a function from a PIL image to float32 [3, S, S].

    Raises:
        UserError: nothing usable is there. Random weights are never returned.
        IntegrityError: the checkpoint is damaged, or weights are not finite.
    """
    if jit:
        raise UserError("jit=True: there is no scripted variant, pass jit=False")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size={image_size} must be at least 1")
    source = read_source(name_or_path, weights=weights, cache_dir=download_root)
    if image_size is not None and image_size != source.config.vision.image_size:
        source = _resize(source, image_size=image_size)
    loaded = assemble(source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The two scalars stay exact: a rounded logarithm would change every probability.
    exact = {name: parameter.data for name, parameter in loaded.named_parameters() if name.startswith("logit_")}
    loaded = loaded.to(device=device, dtype=dtype)
    for name, value in exact.items():
        loaded.get_parameter(name).data = value.to(device)
    if compile:
        from clip_train.distributed.parallel import compile_each_block

        compile_each_block(loaded)
    return loaded, loaded.preprocess


def read_source(
    name_or_path: str | Path, *, weights: str = "auto", cache_dir: str | None = None, architecture: str | None = None
) -> Source:
    """Find and read what `load` would load, without building the model.

    Args:
        name_or_path: see `load`.
        weights: see `load`.
        cache_dir: of the hub; its default if None.
        architecture: of a weight file that does not tell it and comes without a name.
    """
    if weights not in WEIGHT_CHOICES:
        raise UserError(f"weights={weights!r} must be one of {', '.join(WEIGHT_CHOICES)}")
    if not isinstance(name_or_path, str | Path):
        raise UserError(f"a {type(name_or_path).__name__} is no model to load: give a path or a name")
    name = str(name_or_path)
    if (named := named_file(name)) is not None:
        return _read_named_file(name, *named)
    path = locate(name, cache_dir=cache_dir)
    if path.is_dir():
        source = read_folder(path, weights=weights)._replace(calibration=read_folder_calibration(path))
    else:
        source = _read_file(path, architecture=architecture)
    promised = None if path == Path(name).expanduser() else recorded_activation(name)
    if promised is not None:
        _check_activation(name, promised, recorded=source.config.quick_gelu, origin=source.origin)
    return source


def assemble(source: Source) -> LoadedModel:
    """Return the model of a source in float32, in eval mode, on the CPU.

    Raises:
        UserError: its weights are not those of its config, which may ask for any size.
        IntegrityError: weights are not finite.
    """
    loaded = _empty_model(source)
    assign_weights(loaded, source.tensors, origin=str(source.origin))
    loaded.calibration = calibration_of(loaded, source=source)
    return loaded.eval()


def calibration_of(model: LoadedModel, *, source: Source) -> Calibration | None:
    """Return what the source says of the confidence of `model`, which has its weights in float32.

    A calibration of other weights, as of an earlier step, is left out, with a line on standard error.
    """
    if source.calibration is None or source.calibration.weights_sha256 == weights_sha256(model):
        return source.calibration
    print(
        f"{source.origin}: its calibration is that of other weights ({source.calibration.model}) and is not used; "
        "`clip-train evaluate` with evaluation=[calibrate,reject] makes it anew",
        file=sys.stderr,
    )
    return None


def _read_named_file(name: str, architecture: str, path: Path) -> Source:
    beside = path.parent / open_clip.CONFIG_FILE
    if path.name in open_clip.WEIGHT_FILES and beside.is_file():  # knows activation and normalisation, too
        raise UserError(f"{name}: {beside} tells the architecture; load {path.parent}")
    config, tensors = model_config(architecture), read_weights(path)
    if openai.take_integers(tensors):
        _check_activation(name, config.quick_gelu, recorded=True, origin=path)
    return Source(config, tensors, path)


def _read_file(path: Path, *, architecture: str | None) -> Source:
    tensors = read_weights(path)
    if openai.take_integers(tensors):
        return Source(openai.infer_config(tensors, name=architecture or path.stem, origin=str(path)), tensors, path)
    if architecture is None:
        way = f"write its name before the path, as in ViT-B-32:{path} (see available_models())"
        if any((path.parent / name).is_file() for name in CONFIG_FILES):
            way = f"its folder does: load {path.parent}"
        raise UserError(f"{path}: the file does not tell its architecture; {way}. Its first keys: {first_of(tensors)}")
    return Source(model_config(architecture), tensors, path)


def _check_activation(name: str, promised: bool, *, recorded: bool, origin: Path) -> None:
    if promised != recorded:
        raise UserError(
            f"{name} means quick_gelu={str(promised).lower()}, but {origin} records the opposite: load "
            "it by its path, or take the architecture's twin (with or without -quickgelu)"
        )


def _resize(source: Source, *, image_size: int) -> Source:
    """Return the model for pictures of another size; one line on standard error per table that is interpolated."""
    vision = dataclasses.replace(source.config.vision, image_size=image_size)
    config = dataclasses.replace(source.config, vision=vision)
    empty = _empty_model(source._replace(config=config))
    expected = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    tensors = dict(source.tensors)
    for line in resize_positions(tensors, expected=expected):
        print(f"{source.origin}: {line}", file=sys.stderr)
    return source._replace(config=config, tensors=tensors)


def _empty_model(source: Source) -> LoadedModel:
    """Make the model without weights; a config that asks for far more than the weights hold is told at once."""
    vision, text = source.config.vision, source.config.text
    blocks = text.layers + (sum(vision.resnet_stages) if vision.resnet_stages else vision.layers)
    if vision.timm is None and blocks > len(source.tensors):
        raise UserError(
            f"{source.origin}: its config asks for {blocks:,} blocks, its weights are {len(source.tensors)} tensors; "
            f"first keys of the file: {first_of(source.tensors)}"
        )
    try:
        return empty_model(source.config, tokenizer=source.tokenizer)
    except (RuntimeError, MemoryError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source.origin}: no model of the sizes in its config can be made ({reason}); "
            f"first keys of the file: {first_of(source.tensors)}"
        ) from error
