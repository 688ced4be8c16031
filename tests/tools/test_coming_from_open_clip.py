"""Every flag of open_clip has its place in our keys, and a command of open_clip becomes one of ours."""

import argparse
import ast
import importlib.util
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest

from clip_train.config import load
from clip_train.config_keys import known_keys
from clip_train.schema import CHOICES, ROOTS
from clip_train.tools import coming_from_open_clip
from clip_train.tools.coming_from_open_clip import parse, to_markdown, to_overrides, translate
from clip_train.tools.open_clip_flags import FLAGS, OTHER_DEFAULTS, PEER_VERSION, Fate

PAGE = Path(coming_from_open_clip.__file__).with_suffix(".md")


@pytest.fixture(scope="module")
def peer():
    """The keyword arguments of every `add_argument` of open_clip's own parser, by flag; its module is not imported."""
    pytest.importorskip("open_clip_train")
    if version("open_clip_torch") != PEER_VERSION:
        pytest.skip(f"the table is that of {PEER_VERSION}")
    found = {}
    source = Path(importlib.util.find_spec("open_clip_train.params").origin).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            found[node.args[0].value] = constants
    assert len(found) > 80
    return found


def test_the_table_has_every_flag_with_as_many_values(peer):
    assert {flag.name for flag in FLAGS} == set(peer)
    for flag in FLAGS:
        given = peer[flag.name]
        several = given.get("nargs") in ("+", "*")
        assert flag.num_values == (0 if given.get("action") == "store_true" else -1 if several else 1), flag.name
    assert {name: str(peer[name]["default"]) for name in OTHER_DEFAULTS} == OTHER_DEFAULTS


def test_every_key_in_the_table_is_one_of_ours():
    keys = {key for root in ROOTS.values() for key in known_keys(root)} | set(CHOICES)
    for flag in FLAGS:
        assert set(flag.keys) <= keys, flag.name
        assert flag.keys or flag.fate not in (Fate.key, Fate.think), flag.name


def test_the_page_is_that_of_the_table():
    again = "python -m clip_train.tools.coming_from_open_clip > clip_train/tools/coming_from_open_clip.md"
    assert PAGE.read_text(encoding="utf-8") == to_markdown(), f"write it again: {again}"


def test_one_flag_names_its_key():
    assert translate(["--train-data", "X"]) == "--train-data is data.train here: write data.train=X"
    assert translate(["--lr=1e-3"]) == "--lr is optim.lr here: write optim.lr=1e-3"
    assert translate(["--local-loss"]).startswith("--local-loss is a flag of open_clip, always so here")
    assert translate(["--momentum", "0.9"]) == "--momentum is a flag of open_clip, absent here: AdamW only"
    assert translate(["--cfg-like", "optim.lr=1"]) is None


def test_a_whole_command_becomes_one_that_composes_to_the_same_recipe(tmp_path):
    given = """--train-data '/data/cc12m/{0000..1242}.tar' --dataset-type webdataset --train-num-samples 10968539
        --imagenet-val /data/imagenet --val-data=/data/val.tar --batch-size 320 --accum-freq 4 --precision amp_bf16
        --workers 8 --warmup 2000 --lr 5e-4 --beta2 0.95 --wd 0.1 --epochs 32 --model ViT-B/16 --grad-clip-norm 1.0
        --report-to wandb,tensorboard --wandb-notes 'second try' --local-loss --gather-with-grad --grad-checkpointing
        --force-patch-dropout 0.5 --image-mean 0.5 0.5 0.5 --lr-scheduler const --name first --logs /runs seed=3"""
    told = translate(shlex.split(given))
    (line,) = (one for one in told.splitlines() if "clip-train train" in one)
    words = shlex.split(line.partition("clip-train train")[2])
    config = load("train", words)
    assert config.data.train == "/data/cc12m/{0000..1242}.tar" and config.data.val == "/data/val.tar"
    assert (config.global_batch_size, config.micro_batch_size, config.data.workers) == (1280, 320, 8)
    assert (config.precision, config.epochs, config.seed, config.name) == ("bf16", 32, 3, "first")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup) == (5e-4, 0.1, 2000)
    assert (list(config.optim.betas), config.optim.schedule, config.optim.max_grad_norm) == ([0.9, 0.95], "constant", 1)
    assert (config.model.name, config.model.checkpointing, config.model.patch_dropout) == ("ViT-B-16", 1, 0.5)
    assert list(config.model.mean) == [0.5] * 3 and config.run_dir == "/runs/first"
    assert (config.logging.wandb, config.logging.tensorboard, config.logging.wandb_notes) == (
        "online", True, "second try",
    )  # fmt: skip
    assert config.evaluation["imagenet"].root == "/data/imagenet" and "val" in config.evaluation
    assert "--train-num-samples: not needed" in told and "--local-loss: always so" in told
    assert "multiply it by the number of GPUs" in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--siglip --loss-dist-impl shift", ["loss=siglip", "model.init_logit_bias=-10", "loss.exchange=ring"]),
        ("--train-data /a.tar::/b.tar", ["data.train=['/a.tar','/b.tar']"]),
        ("--lock-image --pretrained laion2b_s34b_b79k --model ViT-B-32",
         ["model.vision.unlocked_blocks=0", "model.init=ViT-B-32:laion2b_s34b_b79k"]),
        ("--pretrained /w/model.pt --model ViT-B-32", ["model.init=/w/model.pt"]),
        ("--skip-scheduler", ["optim.schedule=constant", "optim.warmup=0"]),
        ("--image-resize-mode squash --force-image-size 384 384", ["model.squash=true", "model.vision.image_size=384"]),
        ("--resume latest --seed 1", ["seed=1"]),
    ],
)  # fmt: skip
def test_values_are_called_as_they_are_here(given, expected):
    overrides, _ = to_overrides(parse(shlex.split(given))[0])
    assert set(expected) <= set(overrides)
    load("train", [*(o for o in overrides if not o.startswith("model.init=")), "steps=20000"])


def test_what_is_absent_is_said_and_not_left_out():
    told = translate(
        shlex.split("--lr-scheduler const-cooldown --opt timm/lion --precision pure_bf16 --model NoSuch-1")
    )
    for expected in ("const-cooldown: absent", "timm/lion: absent", "pure_bf16: absent", "NoSuch-1: no such row"):
        assert expected in told
    told = translate(["--lr", "1", "--nothing"])
    assert "unknown here and there: --nothing" in told and "whole command" not in told


def test_words_are_cut_as_argparse_does():
    parser = argparse.ArgumentParser()
    for flag in FLAGS:
        kind = {0: {"action": "store_true"}, 1: {}, -1: {"nargs": "*"}}[flag.num_values]
        parser.add_argument(flag.name, **kind)
    words = shlex.split(
        "--lr=1e-3 --local-loss --image-mean 0.1 0.2 0.3 --val-d a.tar --wandb-notes 'x y' --aug-cfg scale=(0.4,1) "
        "use_timm=True --siglip --beta1 0.8"
    )
    expected = {name: value for name, value in vars(parser.parse_args(words)).items() if value not in (None, False)}
    given, rest, unknown = parse(words)
    assert not rest and not unknown
    found = {name[2:].replace("-", "_"): values for name, values in given.items()}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert expected[name] in (values, values[0] if values else True)
    assert parse(["--batch_size", "8", "optim.lr=1"]) == ({"--batch-size": ["8"]}, ["optim.lr=1"], [])
