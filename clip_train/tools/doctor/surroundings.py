"""What is around one process: the other ranks, the scheduler, and the hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import torch

from clip_train.distributed.ranks import ranks_from_environment
from clip_train.errors import UserError
from clip_train.tools.ranks import last_lines, run_ranks
from clip_train.tools.verdict import Line, Verdict

MAX_GATHER_ERROR = 1e-4
_MOST_RANKS = 8
_SECONDS = 120.0
_HUB_SECONDS = 3.0
_SLURM_SHOWN = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")


def check_ranks() -> Line:
    """Compare loss and gradients of several processes with those of one, on the GPUs if there are several."""
    ranks = min(_MOST_RANKS, torch.cuda.device_count())
    device = "cuda" if ranks > 1 else "cpu"
    ranks = max(2, ranks)
    where = f"{ranks} processes, {'nccl' if device == 'cuda' else 'gloo'}"
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        code = run_ranks(
            "clip_train.tools.doctor.rank_selftest", [device, str(answer)], ranks=ranks, log=log, seconds=_SECONDS
        )
        if code != 0 or not answer.exists():
            said = f"no end in {_SECONDS:.0f} s" if code is None else last_lines(log)
            return Line(
                Verdict.fail, "ranks", f"{where}: {said}",
                "NCCL_DEBUG=INFO says more" if device == "cuda" else "is the loopback address 127.0.0.1 reachable?",
            )  # fmt: skip
        errors = [float(error) for error in json.loads(answer.read_text(encoding="utf-8"))]
    error = max(errors)
    text = f"{where}: loss and gradients differ from one process by {error:.1e}"
    if not error <= MAX_GATHER_ERROR:
        wrong = [str(rank) for rank, one in enumerate(errors) if not one <= MAX_GATHER_ERROR]
        return Line(
            Verdict.fail, "ranks", f"{text}, on rank {', '.join(wrong)}",
            "these do not see the same negatives: report it with --bundle",
        )  # fmt: skip
    return Line(Verdict.ok, "ranks", text)


def check_scheduler() -> Line:
    """Say what SLURM has set, and whether it contradicts torchrun."""
    found = {name: os.environ[name] for name in _SLURM_SHOWN if name in os.environ}
    text = " ".join(f"{name}={value}" for name, value in found.items())
    try:
        ranks = ranks_from_environment()
    except UserError as error:
        return Line(Verdict.fail, "launcher", str(error), "unset what an earlier launch has left")
    if not found:
        text = "SLURM is installed, this is no job of it" if shutil.which("srun") else "no SLURM here"
    return Line(Verdict.ok, "launcher", f"{text}; this is rank {ranks.rank} of {ranks.size}")


def check_hub(*, seconds: float = _HUB_SECONDS) -> Line:
    """Ask the hub that huggingface_hub is set to for a sign of life."""
    from huggingface_hub import constants

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return Line(Verdict.ok, "hub", "not asked: HF_HUB_OFFLINE is set")
    if not address.startswith(("http://", "https://")):
        return Line(Verdict.fail, "hub", f"{address} is no address", "HF_ENDPOINT must be a URL")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds):
            pass
    except urllib.error.HTTPError as error:  # it answers
        if error.code >= 500:
            return Line(Verdict.warning, "hub", f"{address} answers with {error.code}", "try again later")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Line(
            Verdict.warning, "hub", f"{address} cannot be reached in {seconds:.0f} s: {reason}",
            "fetch models elsewhere and set HF_HUB_OFFLINE=1, or set HTTPS_PROXY",
        )  # fmt: skip
    return Line(Verdict.ok, "hub", f"{address} answers")
