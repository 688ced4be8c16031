"""Memory of one rank, item by item, from the sizes of what it holds."""

from __future__ import annotations

import bisect
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clip_train.data.workers import BATCHES_UNDER_WAY
from clip_train.distributed.config import Strategy
from clip_train.loss.config import Exchange, SigLipLossConfig
from clip_train.loss.tiles import TILE
from clip_train.tools.plan.trace import trace_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.schema import TrainConfig
    from clip_train.tools.plan.trace import StepTrace

_FLOAT32 = 4
_CPU_BUFFERS = 2  # of one tile
_ROW_EXTRAS = 17  # bytes of length, slot and flag


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank in the worst moment of a step, on its device."""

    weights: int
    optimizer: int
    ema: int
    activations: int
    gradients: int  # those that exist while the activations do
    features: int  # of all ranks' captions, and their gradient
    loss_tiles: int
    batch: int
    snapshot: int  # of a checkpoint that is written while training goes on; on the CPU
    process: int  # libraries and interpreter; on the CPU

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


class MemoryPlan(NamedTuple):
    """Bytes of a rank and of a checkpoint."""

    rank: RankMemory
    checkpoint: int


def plan_memory(
    config: TrainConfig, *, lengths: Sequence[int], device: str, ranks: int, steps: int, process: int = 0
) -> MemoryPlan:
    """Return what a rank of the run takes, and a checkpoint on disk.

    Args:
        config: the run's, suited to its tokenizer.
        lengths: tokens of captions of the training data.
        device: `cpu` or `cuda`, which need not be there.
        ranks: of the run.
        steps: length of the run.
        process: what a process has resident before it holds anything of the run; counted on the CPU only.
    """
    rows = config.global_batch_size // ranks
    micro = config.micro_batch_size if isinstance(config.micro_batch_size, int) else rows
    fsdp = ranks > 1 and config.distributed.strategy is Strategy.fsdp
    cached = micro < rows
    kept = cached or (ranks > 1 and not fsdp)
    trace = trace_step(config, rows=min(micro, rows), lengths=lengths, device=device, kept_gradients=kept)
    loss = _loss_bytes(config, rows=rows, ranks=ranks, device=device)
    shards = (config.distributed.shard_ranks or ranks) if fsdp else 1
    on_cpu = device == "cpu"
    weights, optimizer, ema = (-(-size // shards) for size in (trace.weights, trace.optimizer, trace.ema))
    saves_meanwhile = config.checkpoint.asynchronous and config.checkpoint.every < steps
    rank = RankMemory(
        weights=weights + (_gathered_weights(trace) if fsdp else 0),
        optimizer=optimizer,
        ema=ema,
        activations=trace.activations + (_cached_features(config, rows=rows) if cached else 0),
        gradients=_gradients(trace, shards=shards, tiles=loss[1], kept=kept),
        features=loss[0],
        loss_tiles=loss[1],
        batch=batch_bytes(config, rows=rows),
        snapshot=weights + optimizer + ema if on_cpu and saves_meanwhile else 0,
        process=process if on_cpu else 0,
    )
    return MemoryPlan(rank, trace.weights + trace.optimizer + trace.ema)


def fitting_micro_batch(
    config: TrainConfig, *, lengths: Sequence[int], device: str, ranks: int, steps: int, process: int, capacity: int
) -> int | None:
    """Return the largest number of pairs in one forward pass with which a rank fits, None if not even one does.

    The arguments are those of `plan_memory`. capacity: bytes of a rank.
    """
    rows = config.global_batch_size // ranks
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]

    def is_too_much(size: int) -> bool:
        tried = replace(config, micro_batch_size=size)
        found = plan_memory(tried, lengths=lengths, device=device, ranks=ranks, steps=steps, process=process)
        return found.rank.total > capacity

    fitting = bisect.bisect_left(sizes, True, key=is_too_much)
    return sizes[fitting - 1] if fitting else None


def batch_bytes(config: TrainConfig, *, rows: int) -> int:
    """Return the bytes of a batch as the loader delivers it."""
    vision, length = config.model.vision, config.model.text.context_length
    picture = _FLOAT32 * config.model.embed_dim if vision.cache_features else 3 * vision.image_size**2
    return rows * (picture + 8 * length + _ROW_EXTRAS)


def shared_memory_bytes(config: TrainConfig, *, rows: int) -> int:
    """Return the shared memory of this many rows' batches under way in loader processes."""
    return BATCHES_UNDER_WAY * batch_bytes(config, rows=rows) if config.data.workers else 0


def resident_bytes() -> int:
    """Return what this process has resident now, 0 where the system does not tell."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:")


def _gradients(trace: StepTrace, *, shards: int, tiles: int, kept: bool) -> int:
    """Return what gradients add to activations and loss; tiles are gone when the towers' backward pass begins."""
    if shards > 1:
        return -(-trace.gradients // shards) + trace.largest_block
    return max(trace.peak - trace.activations - tiles, trace.gradients if kept else 0)


def _gathered_weights(trace: StepTrace) -> int:
    """FSDP2 holds one block whole and gathers the next."""
    return 2 * trace.largest_block


def _cached_features(config: TrainConfig, *, rows: int) -> int:
    return 4 * rows * config.model.embed_dim * _FLOAT32  # of both towers, with their gradients


def _loss_bytes(config: TrainConfig, *, rows: int, ranks: int, device: str) -> tuple[int, int]:
    """Return the bytes of features, and of logits in tiles, with their gradients."""
    width = config.model.embed_dim
    ring = isinstance(config.loss, SigLipLossConfig) and config.loss.exchange is Exchange.ring
    columns = 2 * rows if ring and ranks > 1 else rows * ranks
    short = _FLOAT32 if config.precision.value == "fp32" else 2
    features = columns * width * (short + _FLOAT32) + rows * width * 3 * _FLOAT32
    most_rows, most_columns = TILE[device]
    tile = min(most_rows, rows) * min(most_columns, rows if ring else columns) * _FLOAT32
    # On CUDA products, always float32, and their gradient; on a CPU two buffers.
    return features, tile + tile * short // _FLOAT32 if device == "cuda" else tile * _CPU_BUFFERS
