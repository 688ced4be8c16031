"""The adapters (LoRA) of a run in peft's own format, for the base model in the layout of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.checkpoint.safetensors_writer import safetensors_chunks
from clip_train.files import write_file
from clip_train.interop.export.tokenizer_files import write_json
from clip_train.interop.transformers import matrix_names

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from clip_train.model.adapters import Adapters
    from clip_train.model.config import ModelConfig

ADAPTER_FOLDER = "adapter"
_PREFIX = "base_model.model."


def write_adapter(folder: Path, *, adapters: Adapters, config: ModelConfig, base: str | None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads.

    Query, key and value are one matrix here and three there: each gets its rows of the one factor, and the other whole.

    Args:
        folder: a new folder.
        adapters: of a run.
        config: an architecture that transformers has.
        base: what the run started from, `model.init`; None for random weights.
    """
    tensors: dict[str, Tensor] = {}
    modules = []
    for name, parts in matrix_names(config, adapters.factors).items():
        down, up = adapters.factors[name]
        for part, rows in zip(parts, up.chunk(len(parts)), strict=True):
            module = part.removesuffix(".weight")
            modules.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = down.clone()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = rows.contiguous()
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
        "inference_mode": True,
    }
    folder.mkdir()
    write_json(folder / "adapter_config.json", values)
    write_file(folder / "adapter_model.safetensors", chunks=safetensors_chunks(tensors))
