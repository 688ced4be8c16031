"""clip-train: contrastive image-text training.

The public API is small and loads lazily: importing this package imports neither torch nor anything heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_train.interop.load import load
    from clip_train.model.zoo import available_models, create_model
    from clip_train.tokenizer.bpe import tokenize

__all__ = ["Run", "available_models", "classify", "create_model", "load", "tokenize"]
__version__ = "0.1.0"

_MODULE_OF = {
    "Run": "clip_train.tools.run",  # a tool, and so above this file: only its name is known here
    "available_models": "clip_train.model.zoo",
    "classify": "clip_train.tools.classify",  # a tool as well
    "create_model": "clip_train.model.zoo",
    "load": "clip_train.interop.load",
    "tokenize": "clip_train.tokenizer.bpe",
}
_LOAD = "load('ViT-B-32:laion2b_s34b_b79k') or load(PATH) returns (model, preprocess)"
_INSTEAD_OF = {  # open_clip's names
    "create_model_and_transforms": _LOAD,
    "create_model_from_pretrained": _LOAD,
    "get_tokenizer": "the model that load returns has its own, model.tokenize",
    "list_models": "available_models() is it here",
    "list_pretrained": "available_models() has the names, load(NAME) tells the published weights of one",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        hint = f": {_INSTEAD_OF[name]}" if name in _INSTEAD_OF else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """List the names that load lazily as well, for completion in notebooks."""
    return sorted({*globals(), *_MODULE_OF})
