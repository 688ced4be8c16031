"""Start and stop the process group; `World` says who and where this process is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]

from clip_train.distributed.hosts import own_host
from clip_train.distributed.launch import open_store
from clip_train.distributed.ranks import ranks_from_environment
from clip_train.distributed.roll_call import RollCall
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
    timeout: timedelta = field(default=timedelta(minutes=5), compare=False, repr=False)
    """How long a new process group lets its collectives wait."""
    roll_call: RollCall | None = field(default=None, compare=False, repr=False)
    """Tells which rank is missing when a collective fails; None without other ranks."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that writes shared files. Never guard a collective with it."""
        return self.rank == 0


def start_world(
    *, device: str = "auto", backend: str = "auto", arrival_seconds: float = 30.0, timeout_seconds: float = 300.0,
    host_tensors: bool = False,
) -> World:  # fmt: skip
    """Read the launcher's variables, choose this rank's device and join the process group.

    Args:
        device: `auto` (CUDA if present, else CPU), `cpu`, `cuda` or `cuda:N`.
        backend: `auto`, `nccl` or `gloo`.
        arrival_seconds: how long the ranks wait here until all of them have come, and to connect to each other.
        timeout_seconds: how long they wait for each other in a collective; see `set_timeout`.
        host_tensors: with nccl, let gloo exchange tensors in the host's memory.

    Raises:
        UserError: CUDA was asked for and is absent, or the rank variables are missing or inconsistent, or not all ranks
            were started, or they do not reach each other.
    """
    ranks = ranks_from_environment()
    chosen = choose_device(device, ranks.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    host_group, roll_call, timeout = None, None, timedelta(seconds=timeout_seconds)
    if ranks.size > 1:
        store = open_store(ranks, seconds=arrival_seconds)
        roll_call = RollCall(store, ranks=ranks)
        roll_call.check_in(seconds=arrival_seconds)
        store.set_timeout(timeout)
        name = backend if backend != "auto" else ("nccl" if chosen.type == "cuda" else "gloo")
        if name == "nccl":
            os.environ.update({**_FLIGHT_RECORDER, **os.environ})
        backends = "cpu:gloo,cuda:nccl" if host_tensors and name == "nccl" else name
        try:
            dist.init_process_group(
                backends, store=PrefixStore("collectives", store), rank=ranks.rank, world_size=ranks.size,
                timeout=timedelta(seconds=arrival_seconds), device_id=chosen if name == "nccl" else None,
            )  # fmt: skip
        except RuntimeError as error:
            raise UserError(
                f"rank {ranks.rank} on {own_host()} found the other ranks, but {name} cannot connect them: "
                f"{str(error).splitlines()[0]}. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface "
                "that all machines share, as in eth0"
            ) from error
        set_timeout(timeout_seconds)
        host_group = dist.new_group(backend="gloo", timeout=timeout) if name == "nccl" else None
    return World(
        rank=ranks.rank, size=ranks.size, local_rank=ranks.local_rank, device=chosen, host_group=host_group,
        timeout=timeout, roll_call=roll_call,
    )  # fmt: skip


def set_timeout(seconds: float) -> None:
    """Let collectives wait so long from now on, in all process groups of this rank."""
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def write_newest_collectives(path: Path) -> None:
    """Write what NCCL's flight recorder remembers of this rank to `path`, for torch's `torchfrtrace`; else nothing."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        path.write_bytes(_dump_nccl_trace())


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device that `device` means for the rank of this number on its machine.

    Raises:
        UserError: it is none that trains, or not there.
    """
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
