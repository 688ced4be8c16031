"""One global batch: forward, loss, backward, update. With micro-batches the gradient stays that of the whole batch.

A contrastive loss needs all features at once, but not all activations. So a batch cut into k micro-batches takes (Gao
et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"):
    1. features of the first k - 1 without a graph, of the last one with it
    2. the loss of all features, once, and its backward pass, which runs on through the last micro-batch's graph
    3. the features of the others once more, with a graph, each receiving the feature gradients found in 2
Random numbers depend on (seed, step, rank, micro-batch) only, so 3 repeats the masks of 1. k = 1 is the ordinary step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from clip_train.data.order import mix64_int
from clip_train.distributed.batch_norm import batch_norms, uncounted
from clip_train.distributed.parallel import average_scalars, gradient_sync
from clip_train.distributed.shards import is_sharded, own_part, whole
from clip_train.errors import UserError
from clip_train.loss.captions import caption_ids
from clip_train.types import Batch, Features

if TYPE_CHECKING:
    from clip_train.distributed.world import World
    from clip_train.loss.base import Loss
    from clip_train.model.clip import CLIP
    from clip_train.optim.ema import Ema

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """What happened in one step, as detached device tensors: reading one waits for the device."""

    loss: Tensor  # [] this rank's share: the mean over ranks is the loss of the global batch
    in_batch_recall: Tensor  # [] share of images that their own caption fits best, averaged over ranks like the loss
    grad_norm: Tensor  # [] of the global gradient over all parameters, before clipping; equal on all ranks
    logit_scale: Tensor  # [] after the update, a logarithm
    skipped: Tensor  # [] bool, equal on all ranks: the update was dropped, weights and optimizer are as before
    finite: Tensor  # [] bool, equal on all ranks: False for a fault; float16 overflow skips but is none
    grad_norms: Tensor  # [P] of each parameter's gradient, as `trained_names` orders them; of its own part if sharded
    image_features: Tensor  # [B, D] of this rank's rows, unit length
    text_features: Tensor  # [B, D]

    def measures(self) -> dict[str, Tensor]:
        """Return what is logged of the step, still on the device."""
        return {
            "loss": self.loss,
            "in_batch_recall@1": self.in_batch_recall,
            "grad_norm": self.grad_norm,
            "logit_scale": self.logit_scale.exp(),
        }


class TrainStep:
    """Trains a model by one global batch per call. Every rank calls it with its own rows of the same batch."""

    def __init__(
        self,
        model: CLIP,
        *,
        wrapped: nn.Module,
        loss_fn: Loss,
        optimizer: torch.optim.Optimizer,
        world: World,
        seed: int,
        precision: str = "fp32",
        max_grad_norm: float | None = None,
        micro_batch_size: int | None = None,
        ema: Ema | None = None,
    ) -> None:
        """Take the parts.

        model: the CLIP model; wrapped: what `parallelize` made of it; optimizer: fused, over the model's parameters.
        precision: `fp32`, or autocast in `bf16` or `fp16`, the latter with loss scaling; `dtype` is its torch type.
        micro_batch_size: rows of this rank that the towers see at a time; None for all.
        """
        self._model, self._wrapped, self._loss_fn, self._optimizer = model, wrapped, loss_fn, optimizer
        self._world, self._seed, self._ema = world, seed, ema
        self.dtype, self._max_grad_norm, self._micro_batch_size = _TYPES[precision], max_grad_norm, micro_batch_size
        self._batch_norms = batch_norms(model)
        # Offloaded weights are updated on the host, by a kernel that would not wait for numbers from the device.
        on_host = any(p.device.type == "cpu" for p in model.parameters())
        self._update_device = torch.device("cpu") if on_host else world.device
        self.loss_scale = LossScale(device=world.device, enabled=precision == "fp16")

    def __call__(self, batch: Batch, *, learning_rate: float, step: int) -> StepResult:
        """Make one update.

        batch: this rank's rows, on its device (`Batch.to`). learning_rate: times a group's own `lr_scale`.
        step: counts updates from 0 and decides all random numbers.

        Raises:
            UserError: the batch cannot be cut into equal micro-batches.
        """
        self._wrapped.train()
        self._world.stalls.begin_step(device=self._world.device)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        loss, features = self.backward(batch, step=step)
        grad_norm, grad_norms, skipped, finite = self._update(loss)
        self._model.clamp_logit_scale_()
        if self._ema is not None:
            self._ema.update()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss,
            in_batch_recall=self._loss_fn.metrics()["in_batch_recall@1"],
            grad_norm=grad_norm,
            logit_scale=self._model.logit_scale.detach().clone(),
            skipped=skipped,
            finite=finite,
            grad_norms=grad_norms,
            image_features=features.image,
            text_features=features.text,
        )

    def backward(self, batch: Batch, *, step: int) -> tuple[Tensor, Features]:
        """Leave the averaged gradient of the global batch in the parameters.

        Returns the loss [], as this rank's share, and the features [B, D], both detached.
        """
        parts = self._cut(batch)
        last = len(parts) - 1
        # Each micro-batch counts once in the running statistics of batch norms: when its graph is made.
        with torch.no_grad(), uncounted(self._batch_norms):
            cached = [self._forward(parts[j], step=step, j=j) for j in range(last)]
        texts: list[Tensor] = []  # of all micro-batches, those of the cached ones as leaves
        ported: list[Tensor] = []

        def start_gather(text: Tensor) -> Tensor:
            texts.extend([_leaf(features.text, like=text) for features in cached] + [text])
            ported.append(self._loss_fn.on_text(torch.cat(texts) if last else text))
            return text

        with gradient_sync(self._wrapped, enabled=last == 0):
            # All texts are known before the last image tower: they are gathered behind it.
            attached = self._forward(parts[last], step=step, j=last, on_text=start_gather)
            images = [*(_leaf(features.image, like=attached.image) for features in cached), attached.image]
            joined = attached._replace(image=torch.cat(images) if last else attached.image, text=ported[0])
            loss = self._loss(joined, batch)
            (loss * self.loss_scale.value).backward()
        for j in range(last):
            with gradient_sync(self._wrapped, enabled=j == last - 1):
                features = self._forward(parts[j], step=step, j=j)
                towers = [(features.image, images[j].grad), (features.text, texts[j].grad)]
                trained = [(output, gradient) for output, gradient in towers if output.requires_grad]
                torch.autograd.backward([output for output, _ in trained], [gradient for _, gradient in trained])
        return loss.detach(), joined._replace(image=joined.image.detach(), text=joined.text.detach())

    def _forward(
        self, part: Batch, *, step: int, j: int, on_text: Callable[[Tensor], Tensor] | None = None
    ) -> Features:
        torch.manual_seed(_random_seed(self._seed, step, self._world.rank, j))
        with self._autocast():
            features: Features = self._wrapped(part.images, part.tokens, on_text, part.lengths.tolist())
        return features

    def _loss(self, features: Features, batch: Batch) -> Tensor:
        features = features._replace(logit_scale=self._model.logit_scale, logit_bias=self._model.logit_bias)
        ids = caption_ids(batch.tokens) if self._loss_fn.needs_caption_ids else None
        with self._autocast():
            losses = self._loss_fn(features, valid=batch.valid, caption_ids=ids)
        return torch.stack(list(losses.values())).sum()

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clip and apply the gradient, unless something is not finite; decided on the device, alike on all ranks.

        Returns grad_norm, grad_norms, skipped and finite of `StepResult`.
        """
        (bad_loss,) = average_scalars(self._model, world=self._world, with_them=[~loss.isfinite()])
        scale = self.loss_scale.value
        norms, total = _gradient_norms(self._model)
        norm = total / scale
        finite_loss = bad_loss == 0
        skipped = ~(norm.isfinite() & finite_loss)
        shrink = torch.ones_like(norm)
        if self._max_grad_norm is not None:
            shrink = (norm / self._max_grad_norm).clamp(min=1.0)
        # The fused optimizers divide gradients by the one and do nothing if the other is 1, as for loss scaling.
        where = self._update_device
        self._optimizer.grad_scale = (scale * shrink).float().to(where)  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped.float().to(where)  # type: ignore[attr-defined]
        self._optimizer.step()
        finite = finite_loss & (~skipped | self.loss_scale.may_shrink())
        self.loss_scale.update(overflow=skipped)
        return norm, norms / scale, skipped, finite

    def _cut(self, batch: Batch) -> list[Batch]:
        rows = len(batch.images)
        size = self._micro_batch_size or rows
        if rows % size:
            raise UserError(f"micro_batch_size={size} must divide the {rows} pairs of each rank")
        return [Batch(*(t[i : i + size] for t in batch)) for i in range(0, rows, size)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


class LossScale:
    """Factor that keeps float16 gradients in range: halved on overflow, doubled after 2000 good steps. Stateful.

    Disabled it is 1 and stays so.
    """

    def __init__(self, *, device: torch.device, enabled: bool) -> None:
        self._enabled = enabled
        self.value = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def may_shrink(self) -> Tensor:
        """Return [] bool: an overflow may be the scale's fault."""
        return self.value > 1.0

    def update(self, *, overflow: Tensor) -> None:
        """Follow one step, on the device."""
        if self._enabled:
            torch._amp_update_scale_(self.value, self._good_steps, overflow.float(), 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, float]:
        """Return the scale and its count of good steps."""
        return {"value": self.value.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.value.fill_(state["value"])
        self._good_steps.fill_(state["good_steps"])


def _leaf(features: Tensor, *, like: Tensor) -> Tensor:
    """Return cached features that collect a gradient if those of a graph do."""
    return features.detach().requires_grad_(like.requires_grad)


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that get gradients, in the order of `StepResult.grad_norms`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for kind in (True, False) for name, p in trained if is_sharded(p) is kind]


def _gradient_norms(model: CLIP) -> tuple[Tensor, Tensor]:
    """Return the 2-norms [P] of the gradients and the norm [] of all, for which ranks sum up their parts."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    device = model.logit_scale.device  # sharded ones may be offloaded
    each: list[Tensor] = []
    totals: list[Tensor] = []
    if sharded := [g for g in gradients if is_sharded(g)]:
        norms = [torch.linalg.vector_norm(g) for g in sharded]
        totals.append(whole(torch.linalg.vector_norm(torch.stack(norms))).to(device))
        each += [own_part(norm).to(device) for norm in norms]
    if plain := [g for g in gradients if not is_sharded(g)]:
        norms = list(torch._foreach_norm(plain))
        totals.append(torch.linalg.vector_norm(torch.stack(norms)))
        each += norms
    return torch.stack(each), torch.stack(totals).norm()


def _random_seed(*parts: int) -> int:
    """Return 63 bits that depend on every part."""
    state = 0
    for part in parts:
        state = mix64_int(state + part)
    return state >> 1
