"""The benchmarks run, compare like with like, and count what they say."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_train.interop.export.targets import Target
from clip_train.interop.export.verify import find_libraries
from tests.interop.export.test_export import PYTHONS

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
ADAMW = {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def settings(tmp_path):
    from bench_inputs import drawn_pairs, model_config, model_shape, token_batch

    from clip_train.optim.param_groups import decays

    config = model_config("tiny")
    images, texts = drawn_pairs(16, image_size=config.vision.image_size, seed=0)
    model = config.build(seed=0)
    inputs = {
        "images": images.split(8),
        "tokens": token_batch(texts, context_length=config.text.context_length).split(8),
        "weights": model.state_dict(),
        "decayed": [name for name, parameter in model.named_parameters() if decays(name, parameter)],
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    return {
        "model": model_shape(config), "inputs": str(tmp_path / "inputs.pt"), "weights": True, "seed": 0, "adamw": ADAMW,
        "device": "cpu", "threads": 1, "compile": False, "micro_batch": None, "precision": "fp32",
        "max_grad_norm": 1.0, "peer_fused": False, "peer_block": "default", "peer_normalizes": False,
    }  # fmt: skip


def test_drawn_captions_are_as_long_as_captions_from_the_web():
    from bench_inputs import captions, mean_length, token_batch

    lengths = {
        kind: mean_length(token_batch(captions(2000, seed=1, lengths=kind), context_length=77))
        for kind in ("prompts", "web", "full")
    }
    assert 9 < lengths["prompts"] < 11
    assert 20 < lengths["web"] < 22
    assert lengths["full"] == 77


def test_rounds_take_turns_and_ratios_stay_within_a_round():
    from bench import interleaved, ratio

    clock, order = iter([1.0, 2.0, 30.0, 20.0, 3.0, 3.0]), []

    def side(name):
        return lambda: order.append(name) or next(clock)

    seconds = interleaved({"a": side("a"), "b": side("b")}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert ratio(seconds["b"], seconds["a"]) == {"median": 1.5, "lowest": 1.0, "highest": 2.0}


def test_both_sides_train_alike(settings):
    pytest.importorskip("open_clip")
    from bench_sides import open_clip_step, our_step

    ours, theirs = our_step(settings), open_clip_step(settings)
    for i in range(3):
        assert ours(i).item() == pytest.approx(theirs(i).item(), abs=1e-5)


@pytest.mark.slow
def test_the_step_is_measured_and_written_without_open_clip(tmp_path, monkeypatch):
    import bench_step

    written = tmp_path / "step.json"
    flags = ["--model=tiny", "--batch=4", "--precision=fp32", "--rounds=2", "--steps=3", "--threads=1"]
    monkeypatch.setattr("bench.peer_version", lambda python: None)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *flags, f"--json={written}"])
    bench_step.main()
    record = json.loads(written.read_text())
    (row,) = record["rows"]
    assert (row["side"], row["ratio"], record["environment"]["open_clip_torch"]) == ("ours", None, None)
    assert len(row["seconds"]) == 2
    assert row["samples_per_second"] == pytest.approx(4 * 3 / statistics.median(row["seconds"]))


@pytest.mark.slow
def test_caching_the_loss_and_the_text_tower_are_measured_and_written(tmp_path):
    flags = ["--model=tiny", "--batch=4", "--micro-batch=2", "--precision", "fp32", "--rounds=2", "--threads=1"]
    cached, whole = run("bench_step.py", *flags, out=tmp_path / "step.json")
    ratios = [w / c for w, c in zip(whole["seconds"], cached["seconds"], strict=True)]
    assert (whole["ratio"]["lowest"], whole["ratio"]["highest"]) == (min(ratios), max(ratios))
    (row,) = run("bench_loss.py", "--batch=512", "--rounds=1", "--threads=1", out=tmp_path / "loss.json")
    assert row["batch"] == 512 and row["bytes"]["ours"] > 0
    flags = ["--model=tiny", "--batch=4", "--precision=fp32", "--lengths=web", "--rounds=1", "--threads=1"]
    (row,) = run("bench_text.py", *flags, out=tmp_path / "text.json")
    assert row["captions"] == "web" and row["over_ours_padded"]["median"] > 0


def run(script, *flags, out):
    command = [sys.executable, str(SCRIPTS / script), *flags, f"--json={out}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_both_sides_make_the_same_zero_shot_classifier(tmp_path):
    found = find_libraries(PYTHONS)
    if Target.clip_benchmark not in found:
        pytest.skip("CLIP_TRAIN_VERIFY_PYTHONS names no Python with clip-benchmark")
    subprocess.run(
        [
            sys.executable, SCRIPTS / "bench_prompts.py", "--model", "tiny", "--classes", "3", "--rounds", "1",
            "--threads", "1", "--peer-python", found[Target.clip_benchmark][0], "--json", tmp_path / "x.json",
        ],
        check=True,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert row["prompts"] == 240 and row["max_difference"] < 1e-5
    assert row["ratio"]["median"] == pytest.approx(row["seconds"]["clip_benchmark"][0] / row["seconds"]["ours"][0])
