"""Where rows go, and what happens when that place fails."""

from pathlib import Path

import pytest

from clip_train.metrics.config import LoggingConfig
from clip_train.metrics.sinks import Sinks, read_metrics

FULL = Path("/dev/full")


def open_sinks(run_dir, *, start_step=0, **config):
    return Sinks(run_dir, config=LoggingConfig(**config), run_name="run", start_step=start_step, settings={})


def test_tensorboard_reads_back_every_value_and_hides_what_a_resumed_run_took_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = open_sinks(tmp_path, tensorboard=True)
    for step in (10, 20, 30):
        first.write({"train/loss": 1.0 / step, "perf/samples_per_second": 5.0}, step=step, samples_seen=8 * step)
    first.close()
    second = open_sinks(tmp_path, tensorboard=True, start_step=20)
    second.write({"train/loss": 0.5}, step=30, samples_seen=240)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["perf/samples_per_second", "train/loss"]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.5),
    ]


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_rows_and_not_the_run(tmp_path, capsys):
    sinks = open_sinks(tmp_path)
    sinks.rows.file.close()
    sinks.rows.file = FULL.open("w", encoding="utf-8")
    for step in (1, 2):
        sinks.write({"train/loss": 1.0}, step=step, samples_seen=step)
    sinks.close()
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "No space left" in said and "2 rows are lost" in said


def test_values_that_are_not_finite_read_null(tmp_path):
    sinks = open_sinks(tmp_path)
    sinks.write({"train/loss": float("nan"), "train/grad_norm": 2.0}, step=1, samples_seen=8)
    sinks.close()
    (row,) = read_metrics(tmp_path)
    assert row["train/loss"] is None and row["train/grad_norm"] == 2.0
