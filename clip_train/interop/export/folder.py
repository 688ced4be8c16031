"""One folder that open_clip, transformers, sentence-transformers and clip-benchmark read as it is.

The weights are stored twice, because the layouts differ. The two safetensors files may stand side by side: open_clip
looks for its own name first, transformers knows only `model.safetensors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_train.checkpoint.safetensors_writer import safetensors_chunks
from clip_train.files import write_file
from clip_train.interop.export.tokenizer_files import write_clip_files, write_huggingface_files, write_json
from clip_train.interop.open_clip import CONFIG_FILE, WEIGHT_FILES, second_layout, write_config
from clip_train.interop.transformers import config_from_native, from_native
from clip_train.model.config import TextPool
from clip_train.tokenizer.huggingface import HuggingFaceTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from clip_train.model.config import ModelConfig
    from clip_train.tokenizer.base import Tokenizer

_OPEN_CLIP_CLEANING = {
    "none": "whitespace",
    "whitespace": "whitespace",
    "clip": "lower",
    "canonicalize": "canonicalize",
}
_BICUBIC = 3  # Pillow's number


def write_open_clip(
    folder: Path,
    *,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    published_as: str,
) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`, open_clip's names in float32.

    Args:
        folder: the export.
        config: the architecture.
        tensors: its weights under native names.
        tokenizer: the model's.
        published_as: the export's name. In a local folder any name makes open_clip read the tokenizer that lies there;
            from the hub it must be the repository's.
    """
    vocabulary: dict[str, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        vocabulary = {
            "hf_tokenizer_name": published_as,
            "tokenizer_kwargs": {"clean": _OPEN_CLIP_CLEANING[tokenizer.cleaning]},
            "pad_id": tokenizer.pad_id,
        }
        if config.text.pool is TextPool.end:
            vocabulary |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
        write_huggingface_files(folder, tokenizer=tokenizer, hides_padding=not config.text.sees_padding)
    write_config(folder / CONFIG_FILE, config=config, vocabulary=vocabulary)
    theirs = second_layout(tensors) if config.has_second_layout else tensors
    write_file(folder / WEIGHT_FILES[0], chunks=safetensors_chunks(theirs))


def write_transformers(
    folder: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write what `CLIPModel` or `SiglipModel`, their processors and `SentenceTransformer` load from a folder."""
    values = config_from_native(config)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        special = {"bos": tokenizer.start_id, "eos": tokenizer.end_id, "pad": tokenizer.pad_id}
        values["text_config"] |= {f"{name}_token_id": i for name, i in special.items()}
        write_huggingface_files(folder, tokenizer=tokenizer, hides_padding=not config.text.sees_padding)
    else:
        write_clip_files(folder, context_length=config.text.context_length)
    write_json(folder / "config.json", values)
    write_file(folder / "model.safetensors", chunks=safetensors_chunks(from_native(tensors, config)))
    write_json(folder / "preprocessor_config.json", _image_processor(config))


def _image_processor(config: ModelConfig) -> dict[str, Any]:
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if config.squash else {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": not config.squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
