"""Collect, write and show the numbers of a run: `metrics.jsonl` always, a panel or plain lines, wandb on request.

Values stay on the device until a log step; then one gather and one copy bring them to the host.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clip_train.distributed.collectives import all_gather
from clip_train.metrics.config import LoggingConfig, WandbMode
from clip_train.metrics.hardware import peak_memory_gib
from clip_train.metrics.panel import Panel, say

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.distributed.world import World


class Metrics:
    """The sinks of one run. Every rank makes one and calls `add` and `log`; only rank 0 writes.

    Args:
        run_dir: folder that gets `metrics.jsonl`.
        world: the ranks.
        config: `logging.*`.
        name: run name, shown and given to wandb.
        total_steps: length of the run.
        global_batch_size: pairs per step, for rates and for the chance level ln N.
        start_step: step that the run continues from; later rows of an earlier attempt are dropped.
        settings: the resolved config, for wandb.
        peak_flops: FLOP per second that a rank's device can do, None where that is not known.
    """

    def __init__(
        self, run_dir: Path, *, world: World, config: LoggingConfig, name: str, total_steps: int,
        global_batch_size: int, start_step: int, settings: dict[str, Any], peak_flops: float | None = None,
    ) -> None:  # fmt: skip
        self.world = world
        self.every = config.every
        self.global_batch_size = global_batch_size
        self.sums: dict[str, Tensor] = {}
        self.num_added = 0
        self.seconds_waiting = 0.0
        self.flops = 0.0
        self.peak_flops = peak_flops
        self.window_start = time.monotonic()
        self.file = None
        self.wandb: Any = None
        self.panel = Panel(name=name, total_steps=total_steps, global_batch_size=global_batch_size, shown=world.is_main)
        if world.is_main:
            path = run_dir / "metrics.jsonl"
            _drop_rows_after(path, start_step)
            self.file = path.open("a", encoding="utf-8")
            if config.wandb is not WandbMode.disabled:
                self.wandb = _start_wandb(run_dir, config=config, name=name, settings=settings)

    def add(self, values: dict[str, Tensor], *, seconds_waiting: float, flops: float) -> None:
        """Add one step's device values (means over this rank's share) without waiting for the device.

        flops: useful FLOP of this rank's pairs in this step.
        """
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_added += 1
        self.seconds_waiting += seconds_waiting
        self.flops += flops

    def log(self, *, step: int, samples_seen: int, extra: dict[str, float]) -> dict[str, float]:
        """Average what was added since the last call over steps and ranks, write it and show it. Every rank calls."""
        names = sorted(self.sums)
        device = self.world.device
        on_host = torch.tensor([self.seconds_waiting, self.flops, peak_memory_gib(device)], device=device)
        packed = torch.cat([torch.stack([self.sums[n] for n in names]), on_host])
        ranks = all_gather(packed[None], world=self.world).cpu()  # [ranks, values]
        *means, waiting, flops, _ = ranks.mean(0).tolist()
        seconds = time.monotonic() - self.window_start
        row = {f"train/{n}": value / self.num_added for n, value in zip(names, means, strict=True)}
        row |= {
            "train/loss_of_guessing": math.log(self.global_batch_size),
            "perf/samples_per_second": self.num_added * self.global_batch_size / seconds,
            "perf/step_seconds": seconds / self.num_added,
            "perf/data_wait": waiting / seconds,
            "perf/memory_gib": ranks[:, -1].max().item(),
            **({} if self.peak_flops is None else {"perf/mfu": flops / seconds / self.peak_flops}),
            **extra,
        }
        self.sums, self.num_added, self.seconds_waiting, self.flops = {}, 0, 0.0, 0.0
        self.write(row, step=step, samples_seen=samples_seen)
        self.panel.step(step, row)
        self.window_start = time.monotonic()
        return row

    def write(self, row: dict[str, float], *, step: int, samples_seen: int) -> None:
        """Append one row to every sink. Only rank 0 writes."""
        if self.file is None:
            return
        row = {"step": step, "samples_seen": samples_seen, "time": round(time.time(), 3), **row}
        self.file.write(
            json.dumps(row, allow_nan=False, default=float) + "\n" if _finite(row) else _null_nonfinite(row)
        )
        self.file.flush()
        if self.wandb is not None:
            try:
                self.wandb.log(row, step=step)
            except Exception as error:  # a logger never stops a run
                say(f"wandb is switched off for the rest of this run: {error}")
                self.wandb = None

    def restart_window(self) -> None:
        """Leave the time since the last log row out of the rates, after an evaluation or a save."""
        if self.num_added == 0:
            self.window_start = time.monotonic()

    def close(self) -> None:
        """Flush and close every sink."""
        self.panel.close()
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


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


def _drop_rows_after(path: Path, step: int) -> None:
    """A killed attempt may have logged steps that the resumed one takes again: they must not appear twice."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def _finite(row: dict[str, Any]) -> bool:
    return all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def _null_nonfinite(row: dict[str, Any]) -> str:
    """JSON has no NaN; a lost value reads null, so that every line stays valid JSON."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def _start_wandb(run_dir: Path, *, config: LoggingConfig, name: str, settings: dict[str, Any]) -> Any:
    """Start wandb with an id made from the run directory, so that a resumed run continues its own curves."""
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            name=name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            mode=config.wandb.value,
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True),
        )
    except Exception as error:  # a logger never stops a run
        say(f"wandb is switched off for this run: {error}")
        return None
