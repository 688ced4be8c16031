"""Which rank this process is, as the launcher says. Imports no torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from clip_train.errors import UserError


class Ranks(NamedTuple):
    """This process among those of a run."""

    rank: int
    size: int
    local_rank: int


class _Launcher(NamedTuple):
    name: str
    rank: str
    size: str
    local_rank: str


_TORCHRUN = _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# The batch script of a SLURM job also has SLURM_PROCID and SLURM_NTASKS; only srun sets the size of a step.
_OTHERS = (
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Launcher("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def ranks_from_environment() -> Ranks:
    """Return which process this is by the variables of torchrun, else of srun, else of mpirun; alone without any.

    Raises:
        UserError: a variable is missing, is no number, or contradicts another.
    """
    found = {name: os.environ[name] for name in _TORCHRUN[1:] if name in os.environ}
    others = [ranks for launcher in _OTHERS if (ranks := _read(launcher)).size > 1]
    if not found or found == {"WORLD_SIZE": "1"}:
        return others[0] if others else Ranks(0, 1, 0)
    missing = [name for name in _TORCHRUN[1:] if name not in found]
    if missing:
        raise UserError(
            f"{', '.join(found)} set but {', '.join(missing)} missing: start several processes with torchrun"
        )
    ranks = _read(_TORCHRUN)
    by_hand = "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun itself may well be one task of srun
    if by_hand and others and others[0] != ranks:
        raise UserError(
            f"the environment contradicts itself: {_TORCHRUN.name}'s variables say {ranks}, not {others[0]}"
        )
    return ranks


def own_rank() -> str:
    """Return the rank that the launcher gave this process, unchecked: who speaks and writes before ranks meet."""
    return next((os.environ[one.rank] for one in (_TORCHRUN, *_OTHERS) if one.rank in os.environ), "0")


def _read(launcher: _Launcher) -> Ranks:
    found = {name: os.environ.get(name) for name in launcher[1:]}
    if launcher is not _TORCHRUN and None in found.values():
        return Ranks(0, 1, 0)
    try:
        ranks = Ranks(*(int(value or "") for value in found.values()))
    except ValueError as error:
        raise UserError(f"{', '.join(found)} must be integers, not {found}") from error
    if not 0 <= ranks.rank < ranks.size:
        raise UserError(f"{launcher.rank}={ranks.rank} must lie in [0, {launcher.size}={ranks.size})")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if not 0 <= ranks.local_rank < here:
        raise UserError(f"{launcher.local_rank}={ranks.local_rank} must lie in [0, {here}), the ranks of this machine")
    return ranks
