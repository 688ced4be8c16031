"""Say what was not finite in a step, and on which rank, once it is known that something was not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.distributed.collectives import gather_objects
from clip_train.step import trained_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clip_train.data.stream import BatchStream
    from clip_train.distributed.world import World
    from clip_train.step import StepResult

_ROWS_SHOWN = 3


def blame(result: StepResult, *, slots: Tensor, model: nn.Module, stream: BatchStream, world: World) -> str:
    """Return where NaN or Inf appeared in a step: rank, samples and gradient. It waits for the device.

    Features and losses are each rank's own and name the rank. Gradients are averages over ranks: where only they are
    not finite, the backward pass made it so, and any rank may have. Every rank calls it and gets the same answer.

    slots: [B] of this rank's rows. model: unwrapped.
    """
    own = (
        [
            *_bad_rows("image", result.image_features, slots=slots, stream=stream),
            *_bad_rows("text", result.text_features, slots=slots, stream=stream),
        ],
        bool(result.loss.isfinite()),
        _first_bad_gradient(result, model),
    )
    everyone = gather_objects(own, world=world, group=world.host_group)
    found = [f"rank {rank}: {'; '.join(rows)}" for rank, (rows, _, _) in enumerate(everyone) if rows]
    if not found:  # a bad feature on one rank spoils the losses of all
        found = [f"rank {rank}: the loss of finite features" for rank, (_, fine, _) in enumerate(everyone) if not fine]
    if not found:
        found = ["all features and losses are finite, the backward pass is at fault"]
    if first := next((name for _, _, name in everyone if name is not None), None):
        found.append(f"first gradient that is not finite: {first}")
    return "; ".join(found)


def _bad_rows(tower: str, features: Tensor, *, slots: Tensor, stream: BatchStream) -> list[str]:
    bad = (~features.isfinite().all(dim=1)).cpu()
    number = int(bad.sum())
    if not number:
        return []
    shown = slots.cpu()[bad][:_ROWS_SHOWN]
    names = stream.sample_names(shown.numpy())
    listed = ", ".join(f"{slot} {name}".strip() for slot, name in zip(shown.tolist(), names, strict=True))
    return [f"{tower} features of {number} of {len(bad)} rows, slots {listed}{', …' if number > len(shown) else ''}"]


def _first_bad_gradient(result: StepResult, model: nn.Module) -> str | None:
    finite = result.grad_norms.isfinite().tolist()
    return next((name for name, fine in zip(trained_names(model), finite, strict=False) if not fine), None)
