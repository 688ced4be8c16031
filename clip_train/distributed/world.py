"""Start and stop the process group; `World` says who and where this process is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clip_train.distributed.stalls import Stalls
from clip_train.errors import UserError

# NCCL remembers its newest collectives and writes them to TORCH_FR_DUMP_TEMP_FILE + rank when one never ends.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of a run as this process sees them. `World()` is a run of one process on the CPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    host_group: dist.ProcessGroup | None = None
    """Group for small messages between the hosts' processors, so that agreeing on something never waits for a GPU."""
    stalls: Stalls = field(default_factory=Stalls, compare=False, repr=False)
    """Time that this process waits for features and their gradient."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that writes shared files. Never guard a collective with it."""
        return self.rank == 0


def start_world(
    *, device: str = "auto", backend: str = "auto", timeout_seconds: float = 300.0, host_tensors: bool = False
) -> World:
    """Read torchrun's variables, choose this rank's device and join the process group.

    Args:
        device: `auto` (CUDA if present, else CPU), `cpu`, `cuda` or `cuda:N`.
        backend: `auto`, `nccl` or `gloo`.
        timeout_seconds: how long a collective may wait.
        host_tensors: with nccl, let gloo exchange tensors in the host's memory.

    Raises:
        UserError: CUDA was asked for and is absent, or the rank variables are missing or inconsistent.
    """
    rank, size, local_rank = _ranks_from_environment()
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    host_group = None
    if size > 1:
        name = backend if backend != "auto" else ("nccl" if chosen.type == "cuda" else "gloo")
        if name == "nccl":
            os.environ.update({**_FLIGHT_RECORDER, **os.environ})
        backends = "cpu:gloo,cuda:nccl" if host_tensors and name == "nccl" else name
        dist.init_process_group(
            backends, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds),
            device_id=chosen if name == "nccl" else None,
        )  # fmt: skip
        host_group = dist.new_group(backend="gloo") if name == "nccl" else None
    return World(rank=rank, size=size, local_rank=local_rank, device=chosen, host_group=host_group)


def write_newest_collectives(path: Path) -> None:
    """Write what NCCL's flight recorder remembers of this rank to `path`, for torch's `torchfrtrace`; else nothing."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        path.write_bytes(_dump_nccl_trace())


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _ranks_from_environment() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found or found == {"WORLD_SIZE": "1"}:
        return 0, 1, 0
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{', '.join(found)} set but {', '.join(missing)} missing: start several processes with torchrun"
        )
    try:
        rank, size, local_rank = (int(found[name]) for name in names)
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, not {found}") from error
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} must lie in [0, WORLD_SIZE={size})")
    return rank, size, local_rank


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device} is not a device: choose auto, cpu or cuda") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={device} but this machine shows no CUDA device: device=cpu or device=auto")
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"{chosen} asked for, but this machine shows {torch.cuda.device_count()} CUDA devices")
    elif chosen.type != "cpu":
        raise UserError(f"device={device}: clip-train trains on cuda and cpu")
    return chosen
