"""Give every rank its rows of a step when all ranks have theirs, and keep account of what they are.

A rank that cannot read its data must not leave the others waiting in a collective of the step: they would hang. So
before a step the ranks exchange a few integers through the hosts: does one want to stop, did one fail, which samples
does each show. All of them then train, stop or fail, at the same step. No rank waits for a device.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from clip_train.data.audit import AuditTrail, add_hashes
from clip_train.data.bad import BadLedger, BadSample, cut_ledgers
from clip_train.distributed.collectives import all_gather, gather_objects
from clip_train.distributed.stop import StopReason
from clip_train.errors import ClipTrainError, TrainingFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from clip_train.data.stream import BatchStream, StepReport
    from clip_train.distributed.world import World
    from clip_train.types import Batch


class Delivery(NamedTuple):
    """This rank's rows of a step, or why all ranks stop before it."""

    batch: Batch | None
    stop: StopReason


class StepExchange:
    """Fetches batches together with the other ranks, and writes `audit.bin` and the ledger of bad samples.

    Args:
        stream: where the batches come from; it counts the bad samples.
        batches: its batches, on the device.
        run_dir: the run's directory.
        world: the ranks.
        step, consumed: steps done and samples seen; what an earlier attempt wrote of later ones is dropped.

    Attributes:
        loading_since: while this rank waits for its own batch, when that began on the monotonic clock; else None.
        gathering_since: while it has its batch and waits for the other ranks' word, when that began; else None.
        seconds_loading: how long it waited for its own batches so far.
        newest: step and first slot of the newest batch of all ranks; None before there is one.
    """

    def __init__(
        self, stream: BatchStream, *, batches: Iterator[Batch], run_dir: Path, world: World, step: int, consumed: int
    ) -> None:
        self._stream, self._batches, self._world = stream, batches, world
        self._audit: AuditTrail | None = None
        if world.is_main:  # the others write after the first exchange, thus after this
            cut_ledgers(run_dir, consumed=consumed)
            self._audit = AuditTrail(run_dir, step=step)
        self._ledger = BadLedger(run_dir, rank=world.rank)
        self.loading_since: float | None = None
        self.gathering_since: float | None = None
        self.seconds_loading = 0.0
        self.newest: tuple[int, int] | None = None

    def next(self, *, step: int, stop: StopReason) -> Delivery:
        """Return the rows of a step, counted from 1, unless a rank asks to `stop`. Every rank calls it.

        Raises:
            IntegrityError: on every rank, if the data of one are damaged or too many samples of all are bad.
            TrainingFailed: on every rank, if the loader of one failed.
        """
        batch: Batch | None = None
        error: Exception | None = None
        self.loading_since = asked = time.monotonic()
        try:
            batch = next(self._batches)
        except Exception as raised:  # whatever it is, the other ranks must hear of it
            error = raised
        self.loading_since = None
        self.seconds_loading += time.monotonic() - asked
        report = None if error else self._stream.take_report()
        ranks = self._exchange(report, stop=stop)
        if any(not row.delivered for row in ranks):
            self._raise(error)
        assert report is not None
        if any(row.consumed != report.consumed for row in ranks):
            raise TrainingFailed(f"the ranks stand at different samples: {[row.consumed for row in ranks]}")
        reason = max(row.stop for row in ranks)
        if reason:
            return Delivery(None, reason)
        self.newest = (step, report.consumed)
        if self._audit is not None:
            self._audit.write(step, id_hash=add_hashes(*(row.id_hash for row in ranks)))
        self._ledger.write(report.bad, step=step)
        self._stream.count(self._bad_of_all(report.bad) if any(row.num_bad for row in ranks) else [])
        return Delivery(batch, StopReason.none)

    def close(self) -> None:
        """Close the files."""
        if self._audit is not None:
            self._audit.close()
        self._ledger.close()

    def _exchange(self, report: StepReport | None, *, stop: StopReason) -> list[_Words]:
        words = [int(stop), 0, 0, 0, 0] if report is None else [int(stop), 1, *_as_words(report)]
        self.gathering_since = time.monotonic()
        ranks = all_gather(torch.tensor([words]), world=self._world, group=self._world.host_group)
        self.gathering_since = None
        return [
            _Words(StopReason(level), bool(delivered), consumed, _unsigned(id_hash), num_bad)
            for level, delivered, consumed, id_hash, num_bad in ranks.tolist()
        ]

    def _bad_of_all(self, own: list[BadSample]) -> list[BadSample]:
        of_ranks = gather_objects(own, world=self._world, group=self._world.host_group)
        return [sample for bad in of_ranks for sample in bad]

    def _raise(self, error: Exception | None) -> None:
        """Raise the first failed rank's error on every rank."""
        told = error if error is None or isinstance(error, ClipTrainError) else TrainingFailed(repr(error))
        errors = gather_objects(told, world=self._world, group=self._world.host_group)
        if error is not None and error is not told:
            raise error  # in full where it happened
        raise next(told for told in errors if told is not None)


class _Words(NamedTuple):
    """What a rank tells the others before a step."""

    stop: StopReason
    delivered: bool
    consumed: int
    id_hash: int
    num_bad: int


def _as_words(report: StepReport) -> tuple[int, int, int]:
    return report.consumed, struct.unpack("<q", struct.pack("<Q", report.id_hash))[0], len(report.bad)


def _unsigned(word: int) -> int:
    return word % 2**64
