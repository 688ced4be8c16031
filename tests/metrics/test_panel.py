"""What a person sees of a run's faults, on a terminal and in a log."""

import io

from rich.console import Console

from clip_train.metrics.panel import Panel, faults

ROW = {
    "train/loss": 2.0, "train/loss_of_guessing": 4.5,
    "train/in_batch_recall@1": 0.4, "train/logit_scale": 20.0, "train/learning_rate": 1e-3,
    "perf/samples_per_second": 900.0, "perf/data_wait": 0.02, "perf/memory_gib": 1.0, "perf/step_seconds": 0.1,
    "perf/slowest_rank": 1.02, "perf/seconds_since_save": 245.0, "train/nonfinite_steps": 0,
}  # fmt: skip
FAULTY = ROW | {
    "train/nonfinite_steps": 2, "data/bad_truncated": 1100, "data/bad_too_small": 17, "data/transport_retries": 3.0,
}  # fmt: skip


def shown(row):
    panel = Panel(name="run", total_steps=100, shown=False)
    out = io.StringIO()
    Console(file=out, width=160).print(panel._table(10, row, 60.0))
    return out.getvalue()


def test_faults_are_counted_by_kind_and_left_out_where_there_are_none():
    assert faults(ROW) == []
    assert faults(FAULTY) == ["2 skipped steps", "1,117 bad samples", "3 transport retries"]


def test_the_panel_shows_faults_the_age_of_the_checkpoint_and_the_slowest_rank():
    assert "no faults · checkpoint 4m05s ago" in shown(ROW) and "slowest rank 1.02x" in shown(ROW)
    assert "2 skipped steps · 1,117 bad samples · 3 transport retries · checkpoint 4m05s ago" in shown(FAULTY)


def test_a_line_of_the_log_names_faults(capsys):
    panel = Panel(name="run", total_steps=100, shown=True)
    panel.step(100, FAULTY)
    line = capsys.readouterr().err
    assert "loss 2.000 (guessing 4.500)" in line
    assert "1,117 bad samples" in line and "slowest rank 1.02x" in line
