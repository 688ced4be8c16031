"""What a person sees while a run trains: a progress display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clip_train.redact import redact

SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """Print one line for a person to standard error, above a live panel if there is one."""
    message = redact(message)
    if Panel.live_console is not None:
        Panel.live_console.print(message, highlight=False, markup=False)
    else:
        print(message, file=sys.stderr, flush=True)


class Panel:
    """Shows the newest row of a run. On ranks other than 0 it shows nothing."""

    live_console: Console | None = None

    def __init__(self, *, name: str, total_steps: int, shown: bool) -> None:
        self.name = name
        self.total_steps = total_steps
        self.shown = shown
        self.started = time.monotonic()
        self.last_line = -math.inf
        self.seconds_per_step: deque[float] = deque(maxlen=200)
        self.live: Live | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            self.live = Live(Text("starting"), console=console, refresh_per_second=4, transient=False)
            self.live.start()
            Panel.live_console = console

    def step(self, step: int, row: dict[str, float]) -> None:
        """Show the row of `step`."""
        self.seconds_per_step.append(row["perf/step_seconds"])
        if not self.shown:
            return
        seconds_left = (self.total_steps - step) * statistics.median(self.seconds_per_step)
        if self.live is not None:
            self.live.update(self._table(step, row, seconds_left))
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or step >= self.total_steps:
            self.last_line = time.monotonic()
            phrases = [*self._phrases(row), *faults(row)]
            say(" ".join([f"step {step}/{self.total_steps}", *phrases, f"ETA {duration(seconds_left)}"]))

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            Panel.live_console = None

    def _phrases(self, row: dict[str, float]) -> list[str]:
        scale = row["train/logit_scale"]
        clamped = " (clamped)" if scale >= 99.99 else ""
        return [
            f"loss {row['train/loss']:.3f} (guessing {row['train/loss_of_guessing']:.3f})",
            f"in-batch R@1 {100 * row['train/in_batch_recall@1']:.1f} %",
            f"logit scale {scale:.1f}{clamped}",
            f"lr {row['train/learning_rate']:.2e}",
            f"{row['perf/samples_per_second']:,.0f} samples/s",
            f"data wait {100 * row['perf/data_wait']:.1f} %",
            f"memory {row['perf/memory_gib']:.1f} GiB",
            *([f"MFU {100 * row['perf/mfu']:.1f} %"] if "perf/mfu" in row else []),
            *([f"slowest rank {row['perf/slowest_rank']:.2f}x"] if "perf/slowest_rank" in row else []),
        ]

    def _table(self, step: int, row: dict[str, float], seconds_left: float) -> Group:
        loss, recall, scale, lr, rate, wait, memory, *rest = self._phrases(row)
        head = Table.grid(padding=(0, 2))
        elapsed = duration(time.monotonic() - self.started)
        head.add_row(
            Text(self.name, style="bold"), f"step {step:,} / {self.total_steps:,}",
            ProgressBar(total=self.total_steps, completed=step, width=30),
            f"elapsed {elapsed}  ETA {duration(seconds_left)}",
        )  # fmt: skip
        slow = row["perf/data_wait"] > 0.1
        body = Table.grid(padding=(0, 3))
        body.add_row(Text(loss, style="cyan"), recall, scale, lr)
        waiting = Text(wait + (": raise data.workers" if slow else ""), style="yellow" if slow else "")
        body.add_row(rate, waiting, memory, " ".join(rest))
        found = faults(row)
        saved = f"checkpoint {duration(row['perf/seconds_since_save'])} ago"
        faulty = Text(" · ".join([*(found or ["no faults"]), saved]), style="yellow" if found else "")
        return Group(head, body, faulty)


def faults(row: Mapping[str, float]) -> list[str]:
    """Return what went wrong so far and was survived, such as `17 bad samples`; nothing if nothing did."""
    counts = {
        "skipped steps": row.get("train/nonfinite_steps", 0),
        "bad samples": sum(value for name, value in row.items() if name.startswith("data/bad_")),
        "loader rebuilds": row.get("data/loader_rebuilds", 0),
        "transport retries": row.get("data/transport_retries", 0),
    }
    return [f"{count:,.0f} {what}" for what, count in counts.items() if count]


def duration(seconds: float) -> str:
    """Return seconds as people write them: 42s, 3m08s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
