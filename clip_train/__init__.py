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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
