"""Run one training step of the towers on tensors without memory, and see how much memory they would take.

The model and its operations are the real ones, so that checkpointing, adapters, locked blocks, buckets of captions and
autocast count as they are; only nothing is computed. What is born and dies is followed by the storages of all results.
"""

from __future__ import annotations

import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_train.distributed.parallel import SHORT_TYPES, transformer_blocks
from clip_train.model.config import Ragged
from clip_train.model.finetune import layers_above, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from clip_train.model.clip import CLIP
    from clip_train.schema import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """Bytes on one rank that holds the whole model, for one micro-batch."""

    weights: int
    gradients: int  # of all trained parameters
    optimizer: int
    ema: int
    activations: int  # alive between the forward and the backward pass of the towers, inputs included
    peak: int  # of activations and gradients together
    largest_block: int  # weights of the largest transformer block


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        """Leave out `known` tensors, which exist already."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize | None] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._seen:
            self._seen[place] = weakref.finalize(storage, self._forget, place, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, place: int, size: int) -> None:
        del self._seen[place]
        self.now -= size


def trace_step(
    config: TrainConfig, *, rows: int, lengths: Sequence[int], device: str, kept_gradients: bool
) -> StepTrace:
    """Return the memory of one forward and backward pass of the run's towers.

    Args:
        config: the run's, suited to its tokenizer.
        rows: pairs of the micro-batch.
        lengths: tokens of captions of the training data; they are repeated to fill the rows.
        device: `cpu` or `cuda`, which need not be there.
        kept_gradients: gradients exist before the pass, as in buckets of several ranks or from other micro-batches.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(config, fakes=fakes, device=device)
    with fakes:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer_bytes = _optimizer_bytes(config, model, trained)
        known = [*model.parameters(), *model.buffers()]
        if kept_gradients:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            known += [p.grad for p in trained if p.grad is not None]
        with _generator_untouched(), LiveStorages(known) as live:
            activations = _pass(config, model, live, rows=rows, lengths=lengths, device=device)
            peak = live.peak
        gradients = _bytes(trained)
        return StepTrace(
            weights=_bytes([*model.parameters(), *model.buffers()]),
            gradients=gradients,
            optimizer=optimizer_bytes,
            ema=_bytes(list(model.state_dict().values())) if config.optim.ema_decay is not None else 0,
            activations=activations,
            peak=peak + (gradients if kept_gradients else 0),
            largest_block=max((_bytes(list(block.parameters())) for block in transformer_blocks(model)), default=0),
        )


def _pass(
    config: TrainConfig, model: CLIP, live: LiveStorages, *, rows: int, lengths: Sequence[int], device: str
) -> int:
    """Make the pass, and return the bytes that were alive in its middle."""
    of_rows = [lengths[i % len(lengths)] for i in range(rows)]
    width = config.model.text.context_length
    if device == "cuda" and not config.model.text.sees_padding:
        # Captions are packed there, by a kernel that only runs: as many tokens take as much.
        width = math.ceil(sum(of_rows) / rows)
    images = _images(config, rows=rows, device=device)
    tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
    with _autocast(device, SHORT_TYPES.get(config.precision.value)):
        features = model(images, tokens, None, of_rows)
    middle = live.now
    if device == "cuda":
        # A backward pass wants a real device. There it frees activations as fast as it makes gradients.
        missing = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        live.peak = max(middle, _bytes(missing))
        return middle
    towers = [output for output in (features.image, features.text) if output.requires_grad]
    torch.autograd.backward(towers, [torch.empty_like(output) for output in towers])
    return middle


def _images(config: TrainConfig, *, rows: int, device: str) -> Tensor:
    if config.model.vision.cache_features:
        return torch.zeros(rows, config.model.embed_dim, device=device)
    size = config.model.vision.image_size
    return torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=device)


def fake_model(config: TrainConfig, *, fakes: FakeTensorMode, device: str) -> CLIP:
    """Return the run's model, prepared for training, on tensors of `fakes`."""
    settings = replace(config.model, ragged=Ragged.off) if device == "cuda" else config.model
    if settings.ragged in (Ragged.auto, Ragged.packed) and not settings.text.sees_padding:
        settings = replace(settings, ragged=Ragged.buckets)  # what a CPU does
    with torch.device("meta"):  # timm's models compute with real numbers while they are built
        model = settings.build(seed=config.seed)
        prepare(model, seed=config.seed)
    with fakes:
        made: dict[nn.Parameter, nn.Parameter] = {}  # one that two modules share stays one
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = made.setdefault(parameter, _like(parameter, device=device))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=device)
    return model.train()


def _like(parameter: nn.Parameter, *, device: str) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)


def _optimizer_bytes(config: TrainConfig, model: CLIP, trained: Sequence[nn.Parameter]) -> int:
    """Return the size of the optimizer's state after its first step."""
    above = layers_above(model) if config.optim.layer_decay < 1 else None
    optimizer = config.optim.build(model, layers_above=above)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return _bytes([v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _autocast(device: str, short: torch.dtype | None) -> Iterator[None]:
    """Do as `torch.autocast`, which switches itself off where there is no such device."""
    former = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, short is not None)
    torch.set_autocast_dtype(device, short or former[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, former[0])
        torch.set_autocast_dtype(device, former[1])


@contextmanager
def _generator_untouched() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
