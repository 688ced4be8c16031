"""Where the rows of a run go: `metrics.jsonl` always, wandb and TensorBoard on request. A logger never stops a run."""

from __future__ import annotations

import json
import math
import os
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from clip_train.errors import UserError
from clip_train.files import replace_file
from clip_train.metrics.config import LoggingConfig, WandbMode
from clip_train.metrics.panel import say
from clip_train.metrics.wandb_sink import Wandb

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Row = Mapping[str, Any]


class Sink(Protocol):
    """One place that gets every row."""

    name: str

    def write(self, row: Row, *, step: int) -> None:
        """Append a row: `step`, `samples_seen`, `time` and the values by name."""

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a row. Rows of a step that is taken again are dropped first."""

    name = "metrics.jsonl"

    def __init__(self, run_dir: Path, *, start_step: int, evaluate_again: bool = False) -> None:
        self.path = run_dir / self.name
        self.file = self._continue_after(start_step, evaluate_again=evaluate_again)

    def write(self, row: Row, *, step: int) -> None:
        # JSON has no NaN; a lost value reads null, so that every line stays valid JSON.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(clean, default=float) + "\n")
        self.file.flush()

    def rewind(self, step: int) -> None:
        former, self.file = self.file, self._continue_after(step)  # in this order: a full disk leaves the former open
        former.close()

    def _continue_after(self, step: int, *, evaluate_again: bool = False) -> TextIO:
        """A killed attempt may have logged what the resumed one does again: it must not appear twice."""
        if self.path.exists():
            rows = [row for row in read_metrics(self.path.parent) if row["step"] <= step]
            if evaluate_again:  # a row of evaluations has no loss of a step
                rows = [row for row in rows if row["step"] < step or "train/loss" in row]
            replace_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        try:
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


class TensorBoard:
    """Event files under `tensorboard/` of the run. What a resumed run takes again is hidden from `start_step` on."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        self.folder = str(run_dir / self.name)
        self.writer: Any = None
        self.rewind(start_step)

    def write(self, row: Row, *, step: int) -> None:
        for name, value in row.items():
            if "/" in name:  # step, samples_seen and time are not measurements
                self.writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError('logging.tensorboard=true needs: pip install "clip-train[tensorboard]"') from error
        if self.writer is not None:
            self.writer.close()
        self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()


class Sinks:
    """All sinks of a run. One that fails is switched off with a line; `metrics.jsonl` is tried again with each row.

    Args:
        run_dir: the run's directory.
        config: `logging.*`.
        run_name: shown by wandb.
        start_step: step that the run continues from.
        evaluate_again: whether the evaluations at that step are done again.
        settings: the resolved config, for wandb.

    Raises:
        UserError: a sink that was asked for is not installed.
    """

    def __init__(
        self, run_dir: Path, *, config: LoggingConfig, run_name: str, start_step: int, settings: dict[str, Any],
        evaluate_again: bool = False,
    ) -> None:  # fmt: skip
        self.rows = JsonLines(run_dir, start_step=start_step, evaluate_again=evaluate_again)
        self.held_back = 0  # rows that wait in memory for a disk that can be written again
        self.others: list[Sink] = []
        if config.tensorboard:
            try:
                self.others.append(TensorBoard(run_dir, start_step=start_step))
            except OSError as error:
                say(f"tensorboard is switched off for this run: {error}")
        if config.wandb is not WandbMode.disabled:
            try:
                self.others.append(
                    Wandb(run_dir, config=config, run_name=run_name, start_step=start_step, settings=settings)
                )
            except Exception as error:  # no login, no network
                say(f"wandb is switched off for this run: {error}")

    def write(self, row: Row, *, step: int, samples_seen: int) -> None:
        """Give a row to every sink."""
        full = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3), **row}
        try:
            self.rows.write(full, step=step)
            self.held_back = 0
        except OSError as error:
            self.held_back += 1
            if self.held_back == 1:
                say(f"{self.rows.path} cannot be written ({error}): training goes on, its rows wait in memory")
        for sink in list(self.others):
            try:
                sink.write(full, step=step)
            except Exception as error:
                say(f"{sink.name} is switched off for the rest of this run: {error}")
                self.others.remove(sink)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step` wherever that can be done."""
        for sink in (self.rows, *self.others):
            try:
                sink.rewind(step)
            except Exception as error:
                say(f"{sink.name} keeps the rows after step {step:,}: {error}")

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in (self.rows, *self.others):
            try:
                sink.close()
            except Exception as error:
                missing = f"; {self.held_back} rows are lost" if sink is self.rows and self.held_back else ""
                say(f"{sink.name} could not be closed: {error}{missing}")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, oldest first; an unfinished last line is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
