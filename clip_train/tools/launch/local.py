"""Start the ranks of this machine, watch them, and start them again after a crash."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousHandler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from clip_train.distributed.hosts import HOSTS_VARIABLE
from clip_train.distributed.launch_config import LocalLaunchConfig
from clip_train.errors import UserError
from clip_train.exit_record import EXIT_NAME, ExitRecord, read_exit
from clip_train.metrics.panel import say
from clip_train.starting_point import check_batch
from clip_train.tools.launch.agent import RankAgent
from clip_train.tools.launch.command import LAUNCHED_VARIABLE
from clip_train.tools.launch.machines import Meeting, meet

if TYPE_CHECKING:
    from clip_train.schema import TrainConfig

# torchrun by itself would die of SIGUSR1 and leave its ranks behind.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
_LOOPBACK = "127.0.0.1"  # on one machine the ranks need no name that the network resolves
_LAST_CALL_SECONDS = 5  # for machines beyond the fewest, when all that live have come
_CLOSE_SECONDS = 10
_REJOIN_SECONDS = 300  # after a crash, until the other machines have stopped their ranks too


def launch_local(config: TrainConfig, *, command: list[str]) -> int:
    """Run `command` once for each rank of this machine until the run ends; return its exit code.

    Raises:
        UserError: the number of ranks does not fit machine or batch, or other machines did not come.
    """
    launch = config.launch
    assert isinstance(launch, LocalLaunchConfig)
    processes = launch.processes or _num_gpus(config)
    if launch.fewest == launch.nodes:
        check_batch(config, ranks=processes * launch.nodes)
    variables = {LAUNCHED_VARIABLE: "local", **thread_defaults(processes)}
    if launch.dry_run:
        print(_description(launch, processes=processes, variables=variables, command=command))
        return 0
    meeting = Meeting(run_id=uuid.uuid4().hex, address=_LOOPBACK, endpoint=f"{_LOOPBACK}:0", is_host=True)
    if launch.nodes > 1:
        meeting = meet(launch, seconds=config.distributed.arrival_seconds)
        variables |= {HOSTS_VARIABLE: ",".join(meeting.hosts), **_interface(meeting)}
    os.environ.update(variables)
    run_dir = Path(config.run_dir)
    found = run_dir.exists()
    with contextlib.suppress(OSError):  # the ranks say what is wrong with it
        run_dir.mkdir(parents=True, exist_ok=True)  # so that the end of ranks that never began is written down
    code = _run(command, run_dir=run_dir, launch=launch, processes=processes, meeting=meeting)
    if code == UserError.exit_code and not found:
        with contextlib.suppress(OSError):  # a mistyped command leaves no folder behind
            (run_dir / EXIT_NAME).unlink(missing_ok=True)
            run_dir.rmdir()
    return code


def _run(command: list[str], *, run_dir: Path, launch: LocalLaunchConfig, processes: int, meeting: Meeting) -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    rendezvous = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d", endpoint=meeting.endpoint, run_id=meeting.run_id, min_nodes=launch.fewest,
            max_nodes=launch.nodes, local_addr=meeting.address, is_host=meeting.is_host,
            join_timeout=_REJOIN_SECONDS, last_call_timeout=_LAST_CALL_SECONDS,
        )
    )  # fmt: skip
    spec = WorkerSpec(
        role="rank", local_world_size=processes, entrypoint=command[0], args=("-u", *command[1:]),
        rdzv_handler=rendezvous, max_restarts=launch.restarts, local_addr=meeting.address,
    )  # fmt: skip

    def ended() -> ExitRecord | None:
        record = read_exit(run_dir)
        return record if record is not None and meeting.run_id in record.launch_id else None

    failed, asked = _watch(RankAgent(spec, ended=ended), rendezvous=rendezvous)
    if (record := ended()) is not None:
        return record.code
    return 128 + asked if asked else int(failed)


def _watch(agent: RankAgent, *, rendezvous: RendezvousHandler) -> tuple[bool, signal.Signals | None]:
    """Return whether ranks failed, and which signal this process got, when all ranks of this machine are gone."""
    try:
        result = agent.run()
    except SignalException as stop:
        return True, stop.sigval
    except RendezvousError as error:
        say(f"the machines of this launch lost each other: {error}")
        return True, None
    closing = threading.Thread(target=rendezvous.shutdown, daemon=True)  # which waits for a store that may be cut off
    closing.start()
    closing.join(_CLOSE_SECONDS)
    return result is None or result.is_failed(), None


def _num_gpus(config: TrainConfig) -> int:
    count = torch.cuda.device_count() if config.device != "cpu" else 0
    if not count:
        raise UserError(f"launch.processes= is needed: device={config.device}, and this machine shows no GPU to count")
    return count


def thread_defaults(processes: int) -> dict[str, str]:
    """Return what the ranks get unless it is set: as many threads as there are cores for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))}


def _interface(meeting: Meeting) -> dict[str, str]:
    """Return on which network the ranks of several machines talk, unless that is set: where the machines met."""
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    return dict.fromkeys(names, meeting.interface) if meeting.interface else {}


def _description(launch: LocalLaunchConfig, *, processes: int, variables: dict[str, str], command: list[str]) -> str:
    lines = [
        f"launch=local: {processes} ranks on this machine, started again after a crash up to {launch.restarts} times"
    ]
    if launch.nodes > 1:
        lines += [f"{launch.nodes} machines meet at {launch.rendezvous}; the same command starts each. Of the first:"]
    size = processes * launch.nodes
    for rank in range(processes):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **variables}
        lines.append(f"  {' '.join(f'{name}={value}' for name, value in ranked.items())}")
    lines += ["each runs", f"  {shlex.join(command)}"]
    return "\n".join(lines)
