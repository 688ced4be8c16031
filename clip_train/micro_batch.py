"""Find the largest micro-batch that fits a GPU, by trying: `micro_batch_size=auto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from clip_train.distributed.collectives import all_reduce, broadcast_object
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.model.clip import CLIP
from clip_train.schema import TrainConfig
from clip_train.step import TrainStep
from clip_train.types import Batch

HEADROOM = 0.07
"""Share of the memory that stays free, for fragments and for what other libraries take."""


def choose_micro_batch(
    config: TrainConfig,
    *,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    world: World,
    wanted: Callable[[], StopReason],
) -> int | None:
    """Return the number of rows that `config.micro_batch_size` means, None for all. Called by every rank.

    `auto` is what an earlier attempt of the run recorded, else all rows on the CPU and the most that fit on CUDA. None
    too if a rank is `wanted` to stop amid the search: the first step is then not taken, and the next attempt searches.
    """
    if not isinstance(config.micro_batch_size, str):
        return config.micro_batch_size
    rows = config.global_batch_size // world.size
    path = Path(config.run_dir) / "config.yaml"
    recorded = recorded_micro_batch(path, rows=rows) if world.is_main and config.resume != "never" else None
    recorded = broadcast_object(recorded, world=world)
    if recorded is not None or world.device.type != "cuda":
        return recorded or rows

    def fits(size: int) -> bool:
        # A process by itself: a rank that runs out of memory must not leave others waiting.
        alone = World(device=world.device)
        step = TrainStep(
            model, wrapped=model, loss_fn=config.build_loss(world=alone), optimizer=optimizer, world=alone,
            seed=config.seed, precision=config.precision.value, micro_batch_size=size,
        )  # fmt: skip
        return fits_on_cuda(step, model=model, rows=rows, global_rows=config.global_batch_size, device=world.device)

    return largest_micro_batch(rows, fits=fits, world=world, wanted=wanted)


def largest_micro_batch(
    rows: int, *, fits: Callable[[int], bool], world: World, wanted: Callable[[], StopReason]
) -> int | None:
    """Return the largest divisor of `rows` that fits on every rank, None if one is to stop. Called by every rank.

    fits: whether a micro-batch of so many rows does on this rank; asked a few times, and monotonic.
    wanted: why this rank should stop; asked after each trial.

    Raises:
        UserError: not even a single pair fits.
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    fitting, failing = -1, len(divisors)  # places of the largest known to fit and the smallest known not to
    place = len(divisors) - 1  # most often everything fits
    while failing - fitting > 1:
        own = [int(fits(divisors[place])), -int(wanted())]
        fits_all, stop = all_reduce(torch.tensor(own, device=world.device), world=world, op="min").tolist()
        if stop:
            return None
        if fits_all:
            fitting = place
        else:
            failing = place
        place = (fitting + failing) // 2
    if fitting < 0:
        raise UserError("micro_batch_size=auto: not even one pair fits the device; try distributed=fsdp on several")
    return divisors[fitting]


def recorded_micro_batch(config_path: Path, *, rows: int) -> int | None:
    """Return the micro-batch that an earlier attempt of the run wrote into its config, if it divides `rows`."""
    if not config_path.exists():
        return None
    size = yaml.safe_load(config_path.read_text(encoding="utf-8")).get("micro_batch_size")
    return size if isinstance(size, int) and rows % size == 0 else None


def fits_on_cuda(step: TrainStep, *, model: CLIP, rows: int, global_rows: int, device: torch.device) -> bool:
    """Return whether one `step`, what a real one holds besides, and the headroom fit the device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    capacity = min(free + torch.cuda.memory_reserved(device), allowed)
    # Adam's averages are made by the first update; features and gradients of the other ranks' texts are not here.
    others = 8 * (sum(p.numel() for p in model.parameters()) + (global_rows - rows) * model.config.embed_dim)
    held = None
    try:
        held = torch.empty(others, dtype=torch.uint8, device=device)
        try_step(step, model=model, rows=rows, device=device)
        fits = torch.cuda.max_memory_allocated(device) <= (1 - HEADROOM) * capacity
    except torch.OutOfMemoryError:
        fits = False
    del held
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(device)  # the peak that is logged is that of the run
    return fits


def try_step(step: TrainStep, *, model: CLIP, rows: int, device: torch.device) -> None:
    """Run forward and backward passes on blank images and captions as long as the context; the model stays as it is.

    Gradients are left in the parameters.
    """
    length = model.context_length
    end_id = model.vocab_size - 1 if model.text.end_id is None else model.text.end_id
    tokens = torch.full((rows, length), int(end_id == 0), device=device)  # any word but the end
    tokens[:, -1] = end_id
    batch = Batch(
        images=blank_images(model, rows=rows, device=device),
        tokens=tokens,
        lengths=torch.full((rows,), length),
        slots=torch.arange(rows, device=device),
        valid=torch.ones(rows, dtype=torch.bool, device=device),
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        step.backward(batch, step=0)
    finally:
        for name, buffer in model.named_buffers():  # batch norms have counted the blank images
            buffer.copy_(buffers[name])


def blank_images(model: CLIP, *, rows: int, device: torch.device) -> Tensor:
    """Return what stands for the pictures of a batch: pixels, or features if the run reads these."""
    if model.config.vision.cache_features:
        return torch.zeros(rows, model.config.embed_dim, device=device)
    size = model.config.vision.image_size
    return torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=device)
