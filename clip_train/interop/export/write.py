"""Write the parts of an export that a model's libraries accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from clip_train.interop.export.archive import ARCHIVE_FILE, write_archive
from clip_train.interop.export.folder import write_open_clip, write_transformers
from clip_train.interop.export.onnx_graphs import write_onnx
from clip_train.interop.export.targets import MAIN_TARGET, TARGETS_OF, Part, Target

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.interop.loaded_model import LoadedModel

ONNX_FOLDER = "onnx"


def can_write_onnx() -> bool:
    """Say whether the packages are there that write ONNX files."""
    return find_spec("onnx") is not None and find_spec("onnxscript") is not None


def write_parts(
    folder: Path, *, model: LoadedModel, parts: Sequence[Part], refused: Mapping[Target, str], published_as: str
) -> list[Target]:
    """Write the files of `parts` and return the libraries that they serve.

    Args:
        folder: a new folder.
        model: in float32, in eval mode, on the CPU. What a library has no place for (a `logit_bias` that the caller
            agreed to lose) is left out for this library alone.
        parts: which; a part is left out if its own library refuses.
        refused: the libraries that refuse.
        published_as: the export's name, `ORG/NAME` on the hub.
    """
    config = model.config
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    parts = [part for part in parts if MAIN_TARGET[part] not in refused]
    for part in parts:
        if part is Part.folder:
            write_open_clip(folder, config=config, tensors=tensors, tokenizer=model.tokenize, published_as=published_as)
            if Target.transformers not in refused:
                unbiased = {name: tensor for name, tensor in tensors.items() if name != "logit_bias"}
                write_transformers(
                    folder,
                    config=replace(config, init_logit_bias=None),
                    tensors=unbiased,
                    tokenizer=model.tokenize,
                )
        elif part is Part.clip:
            write_archive(folder / ARCHIVE_FILE, config=config, tensors=tensors)
        else:
            write_onnx(folder / ONNX_FOLDER, model=model)
    return [target for part in parts for target in TARGETS_OF[part] if target not in refused]
