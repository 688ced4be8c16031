"""Two ONNX graphs, one for each tower, of any batch size."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clip_train.interop.export.tokenizer_files import write_json
from clip_train.model.config import Ragged

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.interop.loaded_model import LoadedModel

IMAGE_GRAPH, TEXT_GRAPH, META_FILE = "image.onnx", "text.onnx", "meta.json"


class _ImageTower(nn.Module):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _TextTower(nn.Module):
    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def missing_packages(*, int8: bool) -> list[str]:
    """Return what `write_onnx` needs and is not installed."""
    needed = ("onnx", "onnxscript", "onnxruntime") if int8 else ("onnx", "onnxscript")
    return [name for name in needed if find_spec(name) is None]


def write_onnx(folder: Path, *, model: LoadedModel, int8: bool) -> None:
    """Write `image.onnx`, `text.onnx`, the weights of each in a file beside it, and `meta.json`.

    The graphs map `pixel_values` float32 [B, 3, S, S] to `image_embeds` [B, D] and `input_ids` int64 [B, L] to
    `text_embeds` [B, D], both of unit length; `meta.json` has temperature, bias and preprocessing.

    Args:
        folder: a new folder.
        model: in eval mode, on the CPU.
        int8: also write `image.int8.onnx` and `text.int8.onnx`, whose matrices have 8 bits: a quarter of the size, and
            features that are close rather than equal.
    """
    folder.mkdir()
    config = model.config
    pixels = torch.zeros(2, 3, config.vision.image_size, config.vision.image_size)
    tokens = model.tokenize(["a photo", "a drawing"])
    ragged, model.ragged = model.ragged, Ragged.off  # grouping by length depends on the values, a graph cannot
    try:
        _export(_ImageTower(model), pixels, folder / IMAGE_GRAPH, names=("pixel_values", "image_embeds"))
        # An output named `embedding` would clash with a name inside the text graph, and the file would be invalid.
        _export(_TextTower(model), tokens, folder / TEXT_GRAPH, names=("input_ids", "text_embeds"))
    finally:
        model.ragged = ragged
    if int8:
        for name in (IMAGE_GRAPH, TEXT_GRAPH):
            _quantize(folder / name, out=folder / int8_name(name))
    write_json(folder / META_FILE, _meta(model))


def _export(tower: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        # Traced here, because the exporter would fall back to a graph of this one batch size where tracing fixes it.
        program = torch.export.export(
            tower.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            verbose=False,
            input_names=names[:1],
            output_names=names[1:],
            external_data=True,
        )


def int8_name(name: str) -> str:
    """Return the file name of a graph's 8-bit twin."""
    return name.replace(".onnx", ".int8.onnx")


def _quantize(path: Path, *, out: Path) -> None:
    """Round matrices to 8 bits; activations are rounded as they come (dynamic quantisation)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    graph.graph.ClearField("value_info")  # the exporter's shapes contradict those of the folded weights
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises preprocessing that these graphs do not need
    try:
        quantize_dynamic(graph, str(out), weight_type=QuantType.QInt8)
    finally:
        logger.setLevel(level)


def _meta(model: LoadedModel) -> dict[str, object]:
    config = model.config
    return {
        "model": config.name,
        "embed_dim": config.embed_dim,
        "logit_scale": model.logit_scale.item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
        "logits": "exp(logit_scale) * image_embeds @ text_embeds.T + (logit_bias or 0)",
        "image": {
            "size": config.vision.image_size,
            "resize": "short side, bicubic with antialiasing, then centre crop",
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "text": {
            "context_length": config.text.context_length,
            "vocab_size": config.text.vocab_size,
            "padding": 0,
        },
    }
