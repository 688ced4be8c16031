"""Samples whose content cannot be used: their ledger, their counts, and when there are too many of them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clip_train.errors import IntegrityError
from clip_train.files import replace_file
from clip_train.redact import redact_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

LEDGER_FOLDER = "bad"
BAD_WINDOW = 10_000  # samples over which the bad fraction is taken
MAX_BAD_IN_A_ROW = 100
_SHOWN_BAD = 20


@dataclass(frozen=True, slots=True, order=True)
class BadSample:
    """A sample whose content could not be used."""

    slot: int
    source: str
    shard: str  # name below the source's folder
    index: int  # in the shard
    key: str  # "shard.tar/name-in-shard", for messages
    reason: str  # one of few words
    k: int | None  # which substitute stands in, from 1; None: the row is masked


class BadSamples:
    """Counts the bad samples of all ranks and stops the run where they are too many. Alike on all ranks.

    Args:
        max_fraction: of the last 10,000 samples of all ranks.
    """

    def __init__(self, max_fraction: float) -> None:
        self.by_reason: Counter[str] = Counter()
        self._max_fraction = max_fraction
        self._recent: deque[tuple[int, int]] = deque()  # samples and bad ones per step, over the last 10,000 samples
        self._last_slot, self._in_a_row = -1, 0
        self._first: list[BadSample] = []

    def restore(self, by_reason: Mapping[str, int]) -> None:
        """Go on from the counts of a checkpoint. What the limits look back at begins anew."""
        self.by_reason = Counter(by_reason)

    def add(self, bad: Sequence[BadSample], *, num_samples: int) -> None:
        """Count the bad samples of all ranks in a step of `num_samples`.

        Raises:
            IntegrityError: more than the allowed fraction of the last 10,000, or 100 in a row, are bad.
        """
        self._recent.append((num_samples, len(bad)))
        while sum(samples for samples, _ in self._recent) - self._recent[0][0] >= BAD_WINDOW:
            self._recent.popleft()
        in_order = sorted(bad)
        self.by_reason.update(sample.reason for sample in in_order)
        self._first += in_order[: _SHOWN_BAD - len(self._first)]
        for sample in in_order:
            self._in_a_row = self._in_a_row + 1 if sample.slot == self._last_slot + 1 else 1
            self._last_slot = sample.slot
            if self._in_a_row >= MAX_BAD_IN_A_ROW:
                raise self._too_many(f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used")
        recent = sum(count for _, count in self._recent)
        if recent > self._max_fraction * BAD_WINDOW:
            seen = sum(samples for samples, _ in self._recent)
            raise self._too_many(
                f"{recent} of the last {seen} samples cannot be used, more than data.max_bad_fraction="
                f"{self._max_fraction} of {BAD_WINDOW}"
            )

    def _too_many(self, what: str) -> IntegrityError:
        listed = "; ".join(f"{sample.key}: {sample.reason}" for sample in self._first)
        return IntegrityError(f"{what}. The first: {listed}")


class BadLedger:
    """Appends this rank's bad samples to `bad/rank-NNN.jsonl` of a run, which exists once there is one.

    What a full disk refuses waits for the next step.
    """

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        self._path = run_dir / LEDGER_FOLDER / f"rank-{rank:03d}.jsonl"
        self._file: int | None = None
        self._waiting = b""
        self._told = False

    def write(self, bad: Sequence[BadSample], *, step: int) -> None:
        """Append the bad samples of a step, counted from 1. A disk that is full does not end the run."""
        for sample in bad:
            row = redact_tree(asdict(sample))
            self._waiting += json.dumps({"step": step, "g": row.pop("slot"), **row}).encode() + b"\n"
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._told:
                logger.warning("%s cannot be written (%s): its rows wait in memory", self._path, error)
            self._told = True

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            logger.warning("%s lacks %d rows that could not be written", self._path, self._waiting.count(b"\n"))
        if self._file is not None:
            os.close(self._file)


def cut_ledgers(run_dir: Path, *, consumed: int) -> None:
    """Drop what a killed attempt wrote of slots from `consumed` on, for all ranks that ever were: it comes again."""
    for path in sorted((run_dir / LEDGER_FOLDER).glob("rank-*.jsonl")):
        replace_file(path, "".join(json.dumps(row) + "\n" for row in _rows(path) if row["g"] < consumed))


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Return the bad samples of a run, all ranks together, in the order of their slots `g`."""
    rows = [row for path in (run_dir / LEDGER_FOLDER).glob("rank-*.jsonl") for row in _rows(path)]
    return sorted(rows, key=lambda row: row["g"])


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a ledger; a kill may leave the last one unfinished."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
