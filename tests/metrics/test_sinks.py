"""Where rows go, and what happens when that place fails."""

import json
import struct
from pathlib import Path

import pytest

from clip_train.metrics.config import LoggingConfig, WandbMode
from clip_train.metrics.sinks import Sinks, read_metrics
from clip_train.metrics.wandb_sink import run_id
from tests.checkpoint.faults import Quota

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


def test_a_sink_that_fails_is_switched_off_and_the_rows_go_on(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    (tmp_path / "wandb.json").mkdir()
    sinks = open_sinks(tmp_path, tensorboard=True, wandb=WandbMode.offline)
    sinks.write({"train/loss": 1.0}, step=1, samples_seen=8)
    sinks.close()
    said = capsys.readouterr().err
    assert "tensorboard is switched off" in said and "wandb is switched off" in said
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_rows_that_cannot_be_taken_back_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    sinks = open_sinks(tmp_path)
    for step in (1, 2):
        sinks.write({"train/loss": 1.0}, step=step, samples_seen=step)
    with Quota(tmp_path, num_bytes=0).installed(monkeypatch):
        sinks.rewind(1)
    sinks.write({"train/loss": 2.0}, step=2, samples_seen=2)
    sinks.close()
    assert "keeps the rows after step 1" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_attempt_at_a_run_has_one_id_on_wandb_until_it_starts_over(tmp_path):
    first = run_id(tmp_path, start_step=0)
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert run_id(moved, start_step=20) == run_id(moved, start_step=400) == first
    assert run_id(moved, start_step=0) != first


def wandb_records(folder):
    """The records of wandb's own file, which is a LevelDB log: 32 KiB blocks of parts with checksum, size and kind."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def run_and_rows(folder):
    """The run as wandb will upload it, and its history."""
    found = list(wandb_records(folder))
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    return next(record.run for record in found if record.HasField("run")), rows


@pytest.mark.slow
def test_wandb_gets_group_tags_and_notes_and_a_resumed_run_continues_offline_under_its_id(tmp_path):
    settings = {
        "wandb": WandbMode.offline,
        "wandb_group": "seeds",
        "wandb_tags": ["a", "b"],
        "wandb_notes": "try",
        "every": 10,
    }
    first = open_sinks(tmp_path, **settings)
    for step in (10, 20, 30):
        first.write({"train/loss": 1.0 / step}, step=step, samples_seen=8 * step)
    first.close()
    second = open_sinks(tmp_path, start_step=20, **settings)
    second.write({"train/loss": 0.5}, step=30, samples_seen=240)
    second.close()
    (one, rows), (two, more) = (run_and_rows(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*")))
    assert one.run_id == two.run_id == run_id(tmp_path, start_step=1)
    for run in (one, two):
        assert (run.run_group, run.job_type, list(run.tags), run.notes) == ("seeds", "train", ["a", "b"], "try")
    assert [row["samples_seen"] for row in rows] == [80, 160, 240]
    assert [(row["_step"], row["train/loss"]) for row in more] == [(30, 0.5)]
