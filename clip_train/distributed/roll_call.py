"""Know which rank is missing when a collective fails, which says no more than "connection closed by peer".

Every rank writes a sign of life into the store of the process group each second, and when it leaves, why. The store
works when collectives do not; a rank that waits in one gives signs of life, and one that is killed or stopped does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from clip_train.distributed.hosts import hosts_of, own_host
from clip_train.errors import ClipTrainError, IntegrityError, TrainingFailed, UserError

if TYPE_CHECKING:
    from clip_train.distributed.ranks import Ranks

SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_OF_SILENCE = 4.0  # after which a rank counts as gone
_ERRORS = {UserError.exit_code: UserError, IntegrityError.exit_code: IntegrityError}


class _Sign(NamedTuple):
    """What a rank wrote last."""

    number: int
    step: int | None
    left: bool = False
    code: int = 0
    reason: str = ""
    followed: bool = False  # it left because others were missing


class RollCall:
    """The signs of life of all ranks.

    Args:
        store: seen by all ranks.
        ranks: which of them this process is.
    """

    def __init__(self, store: Store, *, ranks: Ranks) -> None:
        self.step: int | None = None  # steps that this rank has done; the trainer keeps it
        self._store, self._rank, self._size = store, ranks.rank, ranks.size
        self._first = (own_host(), os.getpid())  # rank 0, which keeps the store if no launcher does
        self._closed = threading.Event()
        self._signs = threading.Thread(target=self._give_signs, name="signs of life", daemon=True)

    def check_in(self, *, seconds: float) -> None:
        """Return when all ranks are here.

        Raises:
            UserError: the ranks contradict each other, or some did not come within `seconds`.
        """
        keys = [f"here/{rank}" for rank in range(self._size)]
        try:
            if self._store.add(f"arrivals/{self._rank}", 1) > 1:
                raise UserError(f"several processes have RANK={self._rank}, or another run uses this MASTER_PORT")
            self._store.set(f"process/{self._rank}", json.dumps([own_host(), os.getpid()]))
            self._store.set(keys[self._rank], str(self._size))
            self._store.wait(keys, timedelta(seconds=seconds))
            sizes = [int(self._store.get(key)) for key in keys]
            self._first = self._process_of(0)
        except DistError as error:
            raise UserError(self._who_did_not_come(keys, seconds=seconds)) from error
        if len(set(sizes)) > 1:
            raise UserError(f"the ranks were started with different WORLD_SIZE: {sizes} of rank 0, 1, …")

    def start(self) -> None:
        """Give signs of life from now on."""
        self._signs.start()

    def leave(self, *, code: int, reason: str, followed: bool) -> None:
        """Tell the other ranks that this one ends, why, and whether it only follows ranks that are missing."""
        self._closed.set()
        if self._signs.ident is not None:
            self._signs.join(SECONDS_OF_SILENCE)
        last = _Sign(-1, self.step, left=True, code=code, reason=reason, followed=followed)
        # In a thread, since a store that is cut off never answers.
        writing = threading.Thread(target=self._write, args=[last], daemon=True)
        writing.start()
        writing.join(SECONDS_OF_SILENCE)

    def announce(self, name: str) -> None:
        """Tell the other ranks that something is done."""
        with contextlib.suppress(DistError):  # they do not depend on it
            self._store.set(name, "")

    def await_announcement(self, name: str, *, seconds: float) -> None:
        """Wait until another rank has announced `name`, at most so long, and not for a rank that is gone."""
        with contextlib.suppress(DistError):
            self._store.wait([name], timedelta(seconds=seconds))

    def explain(self, error: BaseException) -> ClipTrainError | None:
        """Return which ranks are missing as the reason of a failed collective, None if `error` is something else."""
        if not isinstance(error, DistError) and not re.search(r"/gloo/|NCCL|caused pair closure", str(error)):
            return None
        timed_out = re.search(r"timed out|timeout", str(error), re.IGNORECASE) is not None
        found: Future[ClipTrainError | None] = Future()

        def look() -> None:
            try:
                found.set_result(self._find_missing(timed_out=timed_out))
            except DistError:
                found.set_result(TrainingFailed("rank 0 or the launcher is gone: the ranks' store no longer answers"))

        threading.Thread(target=look, daemon=True).start()  # a store whose process is stopped never answers
        try:
            missing = found.result(timeout=3 * SECONDS_OF_SILENCE)
        except TimeoutError:
            if self._rank and _wake(*self._first):
                missing = TrainingFailed(
                    f"rank 0, last seen {_at(self._seen_at(_Sign(0, None)))}, is stopped, as by SIGSTOP"
                )
            else:
                missing = TrainingFailed(
                    "rank 0 or the launcher gives no sign of life: the ranks' store does not answer"
                )
        return missing or TrainingFailed(f"the ranks no longer reach each other: {str(error).splitlines()[0]}")

    def _find_missing(self, *, timed_out: bool) -> ClipTrainError | None:
        before = self._read()
        deadline = time.monotonic() + SECONDS_OF_SILENCE
        while True:
            newest = self._read()
            first = next(((rank, sign) for rank, sign in newest.items() if sign.left and not sign.followed), None)
            if first is not None:
                rank, sign = first
                text = f"rank {rank} left {_at(sign.step)}" + (f": {sign.reason}" if sign.code else "")
                return _ERRORS.get(sign.code, TrainingFailed)(text)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        silent = {rank: self._seen_at(sign) for rank, sign in newest.items() if sign == before[rank] and not sign.left}
        stopped = [rank for rank in silent if _wake(*self._process_of(rank))]
        what = "gives no sign of life: it hangs" if timed_out else "is gone: killed, out of memory, or cut off"
        texts = [
            f"rank {rank}, last seen {_at(step)}{self._elsewhere(rank)}, "
            + ("is stopped, as by SIGSTOP" if rank in stopped else what)
            for rank, step in silent.items()
        ]
        return TrainingFailed("; ".join(texts)) if texts else None

    def _seen_at(self, sign: _Sign) -> int | None:
        """A step needs all ranks, so a rank did what this one did; one step less, as a device lags behind its host."""
        return max(sign.step or 0, (self.step or 0) - 1) or None

    def _process_of(self, rank: int) -> tuple[str, int]:
        """Return the machine and the process id of a rank that checked in."""
        host, pid = json.loads(self._store.get(f"process/{rank}"))
        return host, pid

    def _give_signs(self) -> None:
        count = 0
        while not self._closed.wait(SECONDS_BETWEEN_SIGNS if count else 0):
            count += 1
            self._write(_Sign(count, self.step))

    def _write(self, sign: _Sign) -> None:
        try:
            self._store.set(f"sign/{self._rank}", json.dumps(sign))
        except DistError:
            self._closed.set()  # the store is gone, and a collective will tell

    def _read(self) -> dict[int, _Sign]:
        others = [rank for rank in range(self._size) if rank != self._rank]
        known = [rank for rank in others if self._store.check([f"sign/{rank}"])]
        signs = {rank: _Sign(*json.loads(self._store.get(f"sign/{rank}"))) for rank in known}
        return {rank: signs.get(rank, _Sign(0, None)) for rank in others}

    def _elsewhere(self, rank: int) -> str:
        """Name the machine of a rank that checked in, if it is another one."""
        host, _ = self._process_of(rank)
        return "" if host == own_host() else f" on {host}"

    def _who_did_not_come(self, keys: list[str], *, seconds: float) -> str:
        hosts = []
        try:
            came = [self._store.check([key]) for key in keys]
            absent = [rank for rank, here in enumerate(came) if not here]
            present = {
                rank: json.loads(self._store.get(f"process/{rank}"))[0] for rank, here in enumerate(came) if here
            }
            hosts = hosts_of(absent, present=present, size=self._size)
        except DistError:
            absent = [0]  # it took the store with it
        ranks = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(map(str, absent))}"
        where = f" on {', '.join(hosts)}" if hosts else ""
        return (
            f"{ranks} of WORLD_SIZE={self._size}{where} did not come within {seconds:.0f} s: start every rank, or one "
            "process without RANK and WORLD_SIZE; distributed.arrival_seconds= lets them be later"
        )


def _wake(host: str, pid: int) -> bool:
    """Let a rank of this machine that is stopped go on, so that it sees the end of the others and ends too."""
    stat = Path(f"/proc/{pid}/stat")
    if host != own_host() or not stat.exists():
        return False
    stopped = stat.read_text().rpartition(")")[2].split()[0] == "T"
    if stopped:
        os.kill(pid, signal.SIGCONT)
    return stopped


def _at(step: int | None) -> str:
    return "before the first step" if step is None else f"at step {step:,}"
