"""Choices of `checkpoint.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from clip_train.checkpoint.checkpointer import Checkpointer
    from clip_train.checkpoint.state import Stateful
    from clip_train.distributed.world import World

EMA_SUFFIX = "_ema"
"""What the name of an evaluation ends with where it is the moving average of the weights that was evaluated."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay. A stopped or finished run saves in any case."""

    every: int = 1000
    """Steps from one checkpoint to the next."""
    keep: int = 2
    """Newest verified checkpoints that stay on disk, at least 2: one may turn out damaged."""
    milestone_every: int | None = None
    """Steps from one checkpoint that is never deleted to the next, a multiple of `every`; null keeps none for ever."""
    best: str | None = None
    """Metric whose best checkpoint stays besides the newest, as in `val/image_retrieval_recall@1`; `val_ema/…` for the
    moving average of the weights; a leading minus says that smaller is better. An evaluation that beats it saves at
    once. null: none."""
    remote: str | None = None
    """Folder for copies of all checkpoints, as in `s3://bucket/runs/${name}` (fsspec; extras remote and gcs). A run
    directory without checkpoints continues from the newest copy. null: none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in CPU memory; false waits until the checkpoint is on disk."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"checkpoint.every={self.every} must be at least 1 step")
        if self.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.keep} must be at least 2: a damaged checkpoint needs one to fall back to"
            )
        if self.milestone_every is not None and (self.milestone_every < 1 or self.milestone_every % self.every):
            raise UserError(
                f"checkpoint.milestone_every={self.milestone_every} must be null or a multiple of "
                f"checkpoint.every={self.every}"
            )

        if self.remote is not None and "://" not in self.remote:
            raise UserError(f"checkpoint.remote={self.remote} must be a URL, as in s3://bucket/runs/NAME")

    def build(
        self,
        *,
        run_dir: Path,
        world: World,
        tensors: Mapping[str, Stateful],
        state: Mapping[str, Stateful],
        say: Callable[[str], None] | None = None,
    ) -> Checkpointer:
        """Lock `run_dir` and make its checkpointer. Every rank calls this."""
        from clip_train.checkpoint.checkpointer import Checkpointer

        return Checkpointer(run_dir, world=world, config=self, tensors=tensors, state=state, say=say)
