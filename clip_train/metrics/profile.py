"""Write what chosen steps did, operator by operator, as a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from clip_train.distributed.world import World


class StepProfiler:
    """Traces the steps `first` to `last`. Every rank makes one and writes its own file under `run_dir/profile/`.

    A run that continues behind `first` traces what is left of them.
    """

    def __init__(self, steps: tuple[int, int] | None, *, run_dir: Path, world: World) -> None:
        """Trace nothing if `steps` is None."""
        self.first, self.last = steps or (0, -1)
        self.world = world
        self.path = run_dir / "profile" / f"steps-{self.first}-{self.last}-rank-{world.rank}.json.gz"
        self.profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call when `step`, counted from 1, begins."""
        if self.profile is None and self.first <= step <= self.last:
            from torch.profiler import ProfilerActivity, profile

            on_device = [ProfilerActivity.CUDA] if self.world.device.type == "cuda" else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *on_device])
            self.profile.start()

    def after(self, step: int) -> None:
        """Call when `step` has been launched."""
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what has been traced."""
        if self.profile is not None:
            self.profile.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(self.path))
            self.profile = None
