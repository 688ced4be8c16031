"""Plan a run: count, trace, probe, and judge it line by line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_train.distributed.launch_config import LocalLaunchConfig, SlurmLaunchConfig
from clip_train.distributed.world import choose_device
from clip_train.metrics.hardware import A100_PEAK_FLOPS, H100_PEAK_FLOPS, peak_flops
from clip_train.schema import Gpu
from clip_train.starting_point import check_batch, require_precision, suited_to
from clip_train.tools.plan.counts import count_data, count_model
from clip_train.tools.plan.duration import assumed_time, measured_time
from clip_train.tools.plan.facts import FAILED, Machine, Plan
from clip_train.tools.plan.memory import plan_memory, resident_bytes
from clip_train.tools.plan.probe import ProbeFailed, probe
from clip_train.tools.plan.traffic import step_traffic
from clip_train.tools.plan.verdicts import has_obstacles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.schema import PlanConfig, TrainConfig
    from clip_train.tools.plan.duration import RunTime

_GIB = 2**30
# Memory as CUDA reports it, and peak of bfloat16.
GPUS = {
    Gpu.A100_40GB: (int(39.4 * _GIB), A100_PEAK_FLOPS),
    Gpu.A100_80GB: (int(79.2 * _GIB), A100_PEAK_FLOPS),
    Gpu.H100: (int(79.1 * _GIB), H100_PEAK_FLOPS),
    Gpu.H200: (int(139.8 * _GIB), H100_PEAK_FLOPS),
}
_FLOAT32_SLOWDOWN = 8  # of the peak, without tensor cores


def make_plan(config: PlanConfig, overrides: Sequence[str]) -> Plan:
    """Return the plan of a run.

    Args:
        config: as composed.
        overrides: what it was composed from; those of the plan itself are not the run's.

    Raises:
        UserError: the run would be refused before its first step.
        IntegrityError: data are damaged.
    """
    run, options = config.run(), config.plan
    machine = find_machine(run, gpu=options.gpu)
    ranks = options.processes or launched_ranks(run) or (machine.ranks_here if machine.device == "cuda" else 1) or 1
    check_batch(run, ranks=ranks)
    tokenizer = run.tokenizer.build(context_length=run.model.text.context_length, kept_in=None)
    run = suited_to(tokenizer, config=run)
    data = count_data(run, tokenizer=tokenizer)
    steps = run.total_steps(data.num_samples)
    process = resident_bytes()  # everything is imported by now, and nothing is built
    model = count_model(run, lengths=data.lengths)
    memory, checkpoint = plan_memory(
        run, lengths=data.lengths, device=machine.device, ranks=ranks, steps=steps, process=process
    )
    parameters = model.image_parameters + model.text_parameters
    counted = Plan(
        config=run, machine=machine, ranks=ranks, steps=steps, model=model, data=data, memory=memory,
        traffic=step_traffic(run, trained=model.trained_parameters, parameters=parameters, ranks=ranks),
        process_bytes=process, checkpoint_bytes=checkpoint, price=options.price,
    )  # fmt: skip
    if reason := why_not_probed(counted):
        return replace(counted, not_probed=reason, time=time_from_peak(counted))
    try:
        found = probe(
            run, [one for one in overrides if not one.startswith("plan.")], ranks=min(ranks, machine.ranks_here),
            rows=counted.rows, steps=steps, flops_per_step=counted.rows * model.flops_per_pair,
        )  # fmt: skip
    except ProbeFailed as error:
        return replace(counted, not_probed=f"{FAILED}: {error}")
    return replace(counted, probed=found, time=measured_time(run, steps=steps, found=found))


def find_machine(config: TrainConfig, *, gpu: Gpu | None) -> Machine:
    """Return what the run is planned for.

    Raises:
        UserError: the config asks for a device that is not here, or one that does not compute in its precision.
    """
    if gpu is not None:
        memory, peak = GPUS[gpu]
        return Machine(device="cuda", name=gpu.value, is_here=False, ranks_here=0, memory=memory, peak_flops=peak)
    device = choose_device(config.device, 0)
    require_precision(config.precision.value, device=device)
    if device.type == "cuda":
        return Machine(
            device="cuda", name=torch.cuda.get_device_name(device), is_here=True, ranks_here=torch.cuda.device_count(),
            memory=torch.cuda.get_device_properties(device).total_memory,
            peak_flops=peak_flops(device, precision=config.precision.value),
        )  # fmt: skip
    cores = os.cpu_count() or 1
    return Machine(
        device="cpu", name=f"CPU with {cores} cores", is_here=True, ranks_here=cores, memory=free_memory(),
        peak_flops=None,
    )  # fmt: skip


def launched_ranks(config: TrainConfig) -> int | None:
    """Return how many ranks `launch=` starts on all machines, None where it does not say."""
    launch = config.launch
    if isinstance(launch, LocalLaunchConfig | SlurmLaunchConfig) and launch.processes is not None:
        return launch.nodes * launch.processes
    return None


def why_not_probed(plan: Plan) -> str:
    """Return what speaks against running the first steps, empty if nothing does."""
    if not plan.machine.is_here:
        return f"planned for {plan.machine.name}, which is not asked"
    if plan.config.model.vision.cache_features:
        return "model.vision.cache_features=true would first read all pictures"
    return "it would not work" if has_obstacles(plan) else ""


def time_from_peak(plan: Plan) -> RunTime | None:
    """Return the time that the peak of the machine suggests, None if that is not known."""
    if plan.machine.peak_flops is None:
        return None
    slower = _FLOAT32_SLOWDOWN if plan.config.precision.value == "fp32" else 1
    return assumed_time(
        steps=plan.steps, flops_per_step=plan.rows * plan.model.flops_per_pair,
        peak_flops=plan.machine.peak_flops / slower,
    )  # fmt: skip


def free_memory() -> int:
    """Return the bytes that processes of this machine can still take, 0 where the system does not tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
