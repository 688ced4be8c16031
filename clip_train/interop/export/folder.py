"""One folder that open_clip, transformers, sentence-transformers and clip-benchmark read as it is.

The weights are stored twice, because the layouts differ. The two safetensors files may stand side by side: open_clip
looks for its own name first, transformers knows only `model.safetensors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_train.checkpoint.files import safetensors_chunks, write_file
from clip_train.interop.export.tokenizer_files import write_json, write_tokenizer_files
from clip_train.interop.open_clip import CONFIG_FILE, WEIGHT_FILES, second_layout, write_config
from clip_train.interop.transformers import config_from_native, from_native

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from clip_train.model.config import ModelConfig

_BICUBIC = 3  # Pillow's number


def write_open_clip(folder: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`, under open_clip's names in float32."""
    write_config(folder / CONFIG_FILE, config=config)
    theirs = second_layout(tensors) if config.has_second_layout else tensors
    write_file(folder / WEIGHT_FILES[0], chunks=safetensors_chunks(theirs))


def write_transformers(folder: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write what `CLIPModel`, `CLIPProcessor` and `SentenceTransformer` load from a folder."""
    write_json(folder / "config.json", config_from_native(config))
    write_file(folder / "model.safetensors", chunks=safetensors_chunks(from_native(tensors, config)))
    write_json(folder / "preprocessor_config.json", _image_processor(config))
    write_tokenizer_files(folder, context_length=config.text.context_length)


def _image_processor(config: ModelConfig) -> dict[str, Any]:
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
