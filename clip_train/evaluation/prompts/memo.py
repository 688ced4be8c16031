"""Remember the class vectors of large ensembles, so that sets with the same classes share them.

ImageNet and its shifts have one classifier of 80,000 prompts. What is remembered is found by hashes of everything that
decides it: the weights of the text tower, the tokens, how they are averaged, and the precision. A step of training
changes the weights and with them the key; nothing has to be told.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clip_train.distributed.collectives import gather_objects
from clip_train.evaluation.features import WrappedEncoder

if TYPE_CHECKING:
    from clip_train.distributed.world import World

MIN_PROMPTS = 2048  # fewer are encoded sooner than the weights are hashed
MOST_KEPT = 8  # ensembles of one model; a set of vectors for 1,000 classes takes 2 MB
IMAGE_TOWER = "visual."

_kept: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def recall(model: object, key: Hashable) -> Any:
    """Return what `remember` was given, None if nothing."""
    module = _module(model)
    return _kept.get(module, {}).get(key) if module is not None and key is not None else None


def remember(model: object, key: Hashable, value: Any) -> None:
    """Keep a value for as long as the model lives, or until newer ones take its place; not for a key of None."""
    module = _module(model)
    if module is None or key is None:
        return
    values = _kept.setdefault(module, {})
    values[key] = value
    while len(values) > MOST_KEPT:
        del values[next(iter(values))]


def memo_key(
    model: object, *, tokens: Tensor, layout: Sequence[Tensor], parts: Sequence[Sequence[int]], world: World
) -> Hashable:
    """Return a key that is equal only where the vectors are, on every rank; None where remembering does not pay.

    Args:
        model: whose weights can only be told if it is a module.
        tokens: [U, L] of the distinct prompts.
        layout: tensors that say which prompts make which class.
        parts: templates of each further ensemble.
        world: the ranks, all of which call this.
    """
    module = _module(model)
    if len(tokens) < MIN_PROMPTS or module is None:
        return None
    device = world.device.type
    precision = (torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device)))
    weights = _digest([t for name, t in module.state_dict().items() if not name.startswith(IMAGE_TOWER)])
    # Sharded weights differ between ranks, so that one rank's hash does not tell for all of them.
    everywhere = tuple(gather_objects(weights, world=world))
    if None in everywhere:
        return None
    return (everywhere, _digest([tokens, *layout]), tuple(map(tuple, parts)), precision)


def _module(model: object) -> nn.Module | None:
    """Return the module that computes the features of `model` as they are, None if there is none."""
    while isinstance(model, WrappedEncoder) and model.same_features:
        model = model.model
    return model if isinstance(model, nn.Module) else None


def _digest(tensors: Sequence[Tensor]) -> str | None:
    """Return a hash of all values, None if there are none."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{local.dtype} {list(local.shape)}".encode())
        digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
