"""Run a function on several real gloo processes."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def run_on_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120.0, workers: bool = False
) -> list[Any]:
    """Call `function(world, *args)` on `world_size` processes and return what each rank returned, in rank order.

    `function` must be a module-level function; what it returns is pickled (return numpy or plain values, not tensors).
    With `workers` the ranks may start processes of their own.
    A rank that raises fails the test with that rank's traceback.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Ranks are forked from a server that has torch loaded: each would need seconds to load it.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint.state_dict"])
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_main, args=(rank, world_size, port, queue, function, args), daemon=not workers)
        for rank in range(world_size)
    ]
    for p in processes:
        p.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            alive = any(p.is_alive() for p in processes)
            if not queue.empty():
                rank, ok, value = queue.get()
                if not ok:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
            elif not alive or time.monotonic() > deadline:
                raise AssertionError(f"only ranks {sorted(results)} of {world_size} answered in {timeout} s")
            else:
                time.sleep(0.01)
        return [results[r] for r in range(world_size)]
    finally:
        for p in processes:
            p.join(10)
            p.kill()
            p.join()


def _main(rank: int, size: int, port: int, queue: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from clip_train.distributed.world import start_world, stop_world

    try:
        world = start_world(device="cpu", timeout_seconds=60)
        queue.put((rank, True, function(world, *args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        stop_world()
