"""Catalogue of bad input, items 1 to 17: config and command line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.made import numbered_shards

catalogue = pytest.mark.catalogue
pytestmark = pytest.mark.slow  # tests/test_cli.py keeps the shortest of these


GLOBAL = "# @package _global_\n"

REFUSED = [
    pytest.param("optim.lrr=1", ["optim.lrr", "did you mean 'optim.lr'"], marks=catalogue(1)),
    pytest.param("data.cach.dir=/x", ["data.cach.dir", "data.cache.dir"], marks=catalogue(1)),
    pytest.param("optim.lr=fast", ["optim.lr", "fast", "Float"], marks=catalogue(2)),
    pytest.param("steps=1.5", ["steps=1.5", "whole number"], marks=catalogue(2)),
    pytest.param("optim.betas=[0.9,", ["optim.betas"], marks=catalogue(2)),
    pytest.param("logging.tensorboard=perhaps", ["logging.tensorboard", "bool"], marks=catalogue(2)),
    pytest.param("optim.lr=-1", ["optim.lr=-1", "positive"], marks=catalogue(3)),
    pytest.param("optim.lr=0", ["optim.lr=0", "positive"], marks=catalogue(3)),
    pytest.param("optim.lr=nan", ["optim.lr=nan", "finite"], marks=catalogue(3)),
    pytest.param("global_batch_size=0", ["global_batch_size=0", "positive"], marks=catalogue(3)),
    pytest.param("global_batch_size=nan", ["global_batch_size", "nan"], marks=catalogue(3)),
    pytest.param("steps=-4", ["steps=-4", "positive"], marks=catalogue(3)),
    pytest.param("max_hours=nan", ["max_hours=nan", "finite"], marks=catalogue(3)),
    pytest.param("model=ViT-B-33", ["model=ViT-B-33", "did you mean ViT-B-32", "RN50"], marks=catalogue(5)),
    pytest.param("optim=adam", ["optim=adam", "adamw"], marks=catalogue(5)),
    pytest.param("loss=clap", ["loss=clap", "clip, siglip"], marks=catalogue(5)),
    pytest.param("model.vision.image_size=33", ["image_size=33", "patch_size=16"], marks=catalogue(6)),
    pytest.param("optim.warmup=9", ["optim.warmup=9", "steps=4"], marks=catalogue(9)),
    pytest.param("data.train=", ["data.train=''"], marks=catalogue(10)),
    pytest.param("data.train=/nowhere", ["data.train=/nowhere: not found"], marks=catalogue(10)),
    pytest.param("data.train=/no/x-*.tar", ["data.train", "/no/x-*.tar"], marks=catalogue(10)),
    pytest.param(
        "data.train=/no/{0..9}.tar",
        ["/no/0.tar, /no/1.tar, /no/2.tar, /no/3.tar, /no/4.tar, and 5 more"],
        marks=catalogue(11),
    ),
    pytest.param("seed=${nope}", ["seed", "nope"], marks=catalogue(15)),
    pytest.param("seed=${nope:1}", ["seed", "nope"], marks=catalogue(15)),
    pytest.param("name=${oc.env:HOME}", ["name=${oc.env:HOME}"], marks=catalogue(15)),
    pytest.param("=3", ["=3", "KEY=VALUE"], marks=catalogue(1)),
    pytest.param("steps", ["'steps'", "KEY=VALUE"], marks=catalogue(1)),
]


@pytest.mark.parametrize(("override", "parts"), REFUSED)
def test_a_mistake_on_the_command_line_is_one_line_that_names_the_key(train, tmp_path, override, parts):
    done = train(override)
    done.refused(2, *parts)
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@catalogue(1)
def test_a_traceback_is_shown_with_debug_only(train):
    assert "Traceback" in train("optim.lrr=1", "--debug").err


@catalogue(4)
def test_a_batch_that_the_ranks_cannot_share_names_the_nearest_sizes(shards, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "clip_train", "train", f"data.train={shards}/train", f"run_dir={tmp_path}",
             "model=tiny", "device=cpu", "steps=4", "optim.warmup=1", "global_batch_size=13"],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(Path.cwd())},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 2, said
        assert "global_batch_size=13 must be a multiple of the 2 processes: nearest 12 or 14" in said
        assert "Traceback" not in said


@catalogue(7)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_type_that_the_device_lacks_is_refused(monkeypatch, train, precision):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")
    train("device=cuda", f"precision={precision}").refused(2, f"precision={precision}", "Old GPU")


@catalogue(8)
def test_compiling_without_a_compiler_is_refused(monkeypatch, train):
    monkeypatch.setenv("PATH", "/nowhere")
    train("model.compile=true").refused(2, "model.compile=true", "g++")


@catalogue(12)
def test_held_out_shards_that_are_trained_on_are_a_warning(train, shards):
    train(f"data.val={shards}/train").worked("data.val", "2 shards are also in data.train", "s-000.tar")


@catalogue(13)
def test_paths_may_hold_any_character(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "some"))
    odd = tmp_path / "größe #1 ?x=2, (a) ~b 'c' 数据"
    numbered_shards(odd, [6, 6, 6])
    (tmp_path / "some").symlink_to(odd)
    patterns = (odd, f"{odd}/s-{{000..002}}.tar", f"{odd}/s-*.tar", "~/some", "$WHERE/s-{000..002}.tar")
    for number, pattern in enumerate(patterns):
        run_dir = tmp_path / f"läufe #{number}"
        train(f"data.train={pattern}", f"run_dir={run_dir}").worked("pairs from 18")
        assert (run_dir / "metrics.jsonl").exists()
    train(f"data.train={odd}", "run_dir=~/mine").worked()
    assert (tmp_path / "mine" / "metrics.jsonl").exists()
    train(f"data.train={odd}", f"run_dir={tmp_path}/mine").worked("continuing")
    train("data.train=$NOBODY/s.tar", f"run_dir={tmp_path}/none").refused(2, "not found: $NOBODY/s.tar")


@catalogue(14)
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 3\nsteps: 4\n", ["mine.yaml line 2", "duplicate key steps"]),
        ("steps:\t3\n\toptim: {}\n", ["mine.yaml line 1", "'\\t'"]),
        ("optim:\n  lr: fast\n", ["mine.yaml", "# @package _global_"]),
        ("- a\n- list\n", ["mine.yaml", "# @package _global_"]),
        (GLOBAL + "optim:\n  lr: fast\n", ["mine.yaml", "optim.lr", "'fast'", "Float"]),
        (GLOBAL + "optim:\n  lrr: 3\n", ["mine.yaml", "unknown key 'optim.lrr': did you mean 'optim.lr'"]),
        (GLOBAL + "steps: yes\n", ["mine.yaml", "steps", "'True'", "Integer"]),
        (GLOBAL + "optim:\n  lr: !!python/object/apply:os.system [exit]\n", ["mine.yaml line 3", "os.system"]),
        (GLOBAL + "name: ${data.train\n", ["mine.yaml", "${data.train"]),
        ("steps: \0\n", ["experiment=mine", "#x0000"]),
    ],
)
def test_a_recipe_that_is_not_plain_yaml_names_file_and_place(monkeypatch, train, tmp_path, text, parts):
    _recipe(monkeypatch, tmp_path, text)
    train("experiment=mine").refused(2, "mine", *parts)


@catalogue(14)
def test_numbers_and_switches_of_a_recipe_have_the_type_of_their_key(monkeypatch, train, tmp_path):
    _recipe(monkeypatch, tmp_path, GLOBAL + "optim:\n  lr: 1e-4\nlogging:\n  tensorboard: no\n")
    done = train("experiment=mine", "--cfg")
    done.worked("lr: 0.0001", "tensorboard: false")


def _recipe(monkeypatch, tmp_path, text):
    """Put a recipe among copies of the real ones."""
    import shutil

    from clip_train import config, config_keys
    from clip_train.config_dir import config_dir

    copy = shutil.copytree(config_dir(), tmp_path / "configs")
    (copy / "experiment" / "mine.yaml").write_text(text)
    for module in (config, config_keys):
        monkeypatch.setattr(module, "config_dir", lambda: copy)


@catalogue(16)
def test_a_key_that_may_not_change_on_resume_is_shown_from_both_sides(train, tmp_path):
    train().worked()
    train("model.vision.layers=3").refused(2, tmp_path / "run", "model.vision.layers: 2 -> 3")
