import time

import pytest
import torch

from clip_train.distributed.world import World
from clip_train.metrics.config import LoggingConfig
from clip_train.metrics.hardware import peak_flops, peak_memory_gib
from clip_train.metrics.log import Metrics
from clip_train.metrics.sinks import read_metrics


def test_a_row_holds_means_rates_and_the_share_of_the_peak(tmp_path):
    world = World()
    metrics = Metrics(
        tmp_path, world=world, config=LoggingConfig(), name="run", total_steps=9, global_batch_size=8,
        loss_of_guessing=3.0, start_step=0, settings={}, peak_flops=1e9,
    )  # fmt: skip
    names = ("loss", "in_batch_recall@1", "logit_scale")
    for value in (1.0, 2.0):
        metrics.add({name: torch.tensor(value) for name in names}, seconds_waiting=0.01, flops=4e6)
    world.stalls.count(lambda: time.sleep(0.02), device=world.device)
    row = metrics.log(step=2, samples_seen=16, extra={"train/learning_rate": 0.5})
    metrics.close()
    assert (row["train/loss"], row["train/loss_of_guessing"]) == (1.5, 3.0) and row["train/learning_rate"] == 0.5
    seconds = 2 * row["perf/step_seconds"]
    assert row["perf/samples_per_second"] == pytest.approx(16 / seconds)
    assert row["perf/data_wait"] == pytest.approx(0.02 / seconds)
    assert 0.02 <= row["perf/exposed_communication"] * seconds <= seconds
    assert row["perf/mfu"] == pytest.approx(8e6 / seconds / 1e9)
    assert row["perf/memory_gib"] == pytest.approx(peak_memory_gib(torch.device("cpu")), rel=0.1)
    (written,) = read_metrics(tmp_path)
    assert written.items() >= row.items()


def test_time_for_an_evaluation_between_two_rows_is_no_time_of_steps(tmp_path):
    metrics = Metrics(
        tmp_path, world=World(), config=LoggingConfig(), name="run", total_steps=9, global_batch_size=8,
        loss_of_guessing=3.0, start_step=0, settings={},
    )  # fmt: skip
    names = ("loss", "in_batch_recall@1", "logit_scale")
    values = {name: torch.tensor(1.0) for name in names}
    began = metrics.window_start
    metrics.add(values, seconds_waiting=0.0, flops=0.0)
    with metrics.paused():
        time.sleep(0.05)
    metrics.add(values, seconds_waiting=0.0, flops=0.0)
    row = metrics.log(step=2, samples_seen=16, extra={"train/learning_rate": 0.5})
    assert 0 < 2 * row["perf/step_seconds"] <= time.monotonic() - began - 0.05
    metrics.close()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_the_peak_is_known_for_devices_that_are_sold_by_it(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, precision="bf16") == peak
    assert peak_flops(cuda, precision="fp32") is None
    assert peak_flops(torch.device("cpu"), precision="bf16") is None
