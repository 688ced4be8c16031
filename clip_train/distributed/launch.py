"""Where the ranks meet, as the launcher says: a key-value store."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from clip_train.distributed.hosts import own_host
from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.distributed.ranks import Ranks

_SECONDS_TO_CONNECT = 10.0
_SECONDS_BETWEEN_TRIES = 0.2


def open_store(ranks: Ranks, *, seconds: float) -> Store:
    """Return the key-value store over which the ranks find each other; rank 0 hosts it where torchrun does not.

    Raises:
        UserError: it is not told where the store is, or its port is taken, or nobody answers there in time.
    """
    address, port = _master()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = connect_store(
        address, port, hosts=ranks.rank == 0 and not hosted, shared=not hosted, seconds=seconds,
        absent="the launcher" if hosted else "rank 0", place=f"MASTER_ADDR={address} MASTER_PORT={port}",
    )  # fmt: skip
    # On one machine torchrun may keep one store for all restarts; with several it makes a new one each time, and the
    # machines may count restarts differently.
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "ranks", store)


def connect_store(
    address: str, port: int, *, hosts: bool, shared: bool, seconds: float, absent: str, place: str
) -> TCPStore:
    """Return the key-value store at `address`, which this process `hosts` or another one does.

    shared: several stores of one process may use the port. absent, place: who is missing and where, if nobody answers.

    Raises:
        UserError: the port is taken, or nobody answers there in time.
    """
    missing = UserError(f"{absent} is missing: no answer from it at {place} in {seconds:.0f} s")
    opened: Future[TCPStore] = Future()

    def connect() -> None:
        try:
            opened.set_result(
                TCPStore(
                    address, port, is_master=hosts, timeout=timedelta(seconds=seconds), wait_for_workers=False,
                    multi_tenant=shared,
                )
            )  # fmt: skip
        except Exception as error:
            opened.set_exception(error)

    if not hosts and not _listens(address, port, seconds=seconds):
        raise missing
    # In a thread, since a server that is no store may take the connection and then be silent for ever.
    threading.Thread(target=connect, daemon=True).start()
    try:
        return opened.result(timeout=seconds)
    except (DistError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT={port} is in use on {own_host()}: choose another one, or start with launch=local or "
                "torchrun --standalone, which find a free port"
            ) from error
        raise missing from error


def _listens(address: str, port: int, *, seconds: float) -> bool:
    """Wait until somebody listens there. The store would try as well, and print a page of C++ when it gives up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_SECONDS_TO_CONNECT):
            return True
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return False


def _master() -> tuple[str, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: the host of rank 0 and a free port on it; launch=local and torchrun set "
            "them, and scripts/slurm.sh shows how to with srun"
        )
    try:
        port = int(os.environ["MASTER_PORT"])
    except ValueError:
        port = 0
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} must be a port from 1 to 65535")
    return os.environ["MASTER_ADDR"], port
