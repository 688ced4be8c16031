"""Options in combination: each is refused before the first step, or stops, continues and is cut without a trace.

Pairs of values that have not met yet meet first. More of them, 20 to 60 s each:
`CLIP_TRAIN_COMBINATIONS=200 pytest tests/test_combinations.py -m slow`
"""

import hashlib
import itertools
import os
import random
import re
from collections import Counter
from functools import cache, partial

import pytest

import clip_train
from clip_train.config import load
from clip_train.data.scenes.write import write_scenes
from clip_train.distributed.stop import StopReason, StopRequest
from clip_train.errors import UserError
from tests.runs import SMALL_MODEL, RunningRanks, losses_of, steps_done

COUNT = int(os.environ.get("CLIP_TRAIN_COMBINATIONS", "6"))
TEXT = "model.embed_dim=32 model.text.width=32 model.text.heads=1 model.text.layers=2"
TIMM = f"model=timm {TEXT} model.vision.image_size=64 model.vision.timm="
LOCKED = "model.vision.unlocked_blocks=0"
SIGLIP = "loss=siglip model.init_logit_bias=-10 model.init_logit_scale=2.302585"
CHOICES = {
    "ranks": ["1", "2"],
    "distributed": ["", "distributed=fsdp", "distributed=fsdp distributed.shard_ranks=1", "distributed=fsdp",
                    "distributed=fsdp distributed.gradient_type=bf16", "distributed.sync_batch_norm=true"],
    "micro": ["", "micro_batch_size=2", "micro_batch_size=3", "micro_batch_size=auto", "micro_batch_size=5"],
    "loss": ["", SIGLIP, f"{SIGLIP} loss.exchange=ring", "model.init_logit_bias=-3", "model.matryoshka=[8,16]"],
    "duplicates": ["", "loss.duplicates=ignore"],
    "precision": ["precision=fp32", "precision=bf16", "precision=fp16"],
    "model": [" ".join(SMALL_MODEL), f"model=tiny-rn {TEXT}", "model=tiny-siglip model.vision.image_size=64",
              f"{TIMM}test_vit", f"{TIMM}test_efficientnet", f"{TIMM}test_convnext model.vision.timm_proj=mlp"],
    "ragged": ["", "model.ragged=off", "model.patch_dropout=0.5"],
    "checkpointing": ["", "model.checkpointing=1", "model.checkpointing=2"],
    "vision": ["", "", LOCKED, f"{LOCKED} model.vision.cache_features=true", "model.vision.unlocked_blocks=1"],
    "text": ["", "", "model.text.unlocked_blocks=0", "model.text.unlocked_blocks=1"],
    "lora": ["", "", "model.lora.rank=2"],
    "optim": ["", "optim.layer_decay=0.7", "optim.warmup=2", "optim.schedule=constant optim.max_grad_norm=0.1"],
    "ema": ["", "optim.ema_decay=0.9"],
    "length": ["steps=6", "epochs=1.3", "samples=70", "epochs=1 data.epoch_end=drop_last"],
    "evaluation": ["", "evaluation=[val] evaluation.val.every=2", "evaluation=[val] checkpoint.best=val/mean_recall@1"],
    "data": ["data.train=DATA/train", "data.train=[DATA/train,DATA/val]",
             "data.train={a:{shards:DATA/train},b:{shards:DATA/val}}",
             "data.train={a:{shards:DATA/train,weight:1},b:{shards:DATA/val,weight:3}}"],
    "workers": ["data.workers=0", "data.workers=0", "data.workers=2"],
    "nonfinite": ["", "on_nonfinite=skip_step", "on_nonfinite=rewind"],
    "saving": ["checkpoint.every=2", "checkpoint.every=1 checkpoint.asynchronous=false", "checkpoint.every=100"],
}  # fmt: skip
WARNING = re.compile(r"(?i)warning|traceback|\[W\d")
EXPECTED = re.compile(r"no batch for")  # of a machine that has much to do


@cache
def combinations():
    """Draw combinations that bring together as many new pairs of values as a few random ones can."""
    rng, met, chosen = random.Random(0), Counter(), []
    while len(chosen) < COUNT:
        drawn = [{option: rng.choice(values) for option, values in CHOICES.items()} for _ in range(30)]
        drawn.sort(key=lambda one: -sum(1 / (1 + met[pair]) ** 2 for pair in pairs(one)))
        best = next(one for one in drawn if not is_refused_at_once(one))
        met.update(pairs(best))
        chosen.append(best)
    return chosen


def pairs(one):
    return itertools.combinations(sorted(one.items()), 2)


def arguments(one, data, *more):
    listed = [word for option, words in one.items() if option != "ranks" for word in words.split()]
    fixed = ["device=cpu", "global_batch_size=12", f"data.val={data}/val", "optim.lr=1e-4", "logging.every=1"]
    return [word.replace("DATA", str(data)) for word in [*listed, *fixed, *more]]


def is_refused_at_once(one):
    try:
        load("train", arguments(one, "data"))
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def stop_after(calls, _rank):
    """Press Ctrl-C when this process has asked so often whether it is to stop."""
    count, wanted = itertools.count(1), StopRequest.wanted

    def asked(self):
        if next(count) > calls:
            self.reason = StopReason.interrupted
        return wanted(self)

    StopRequest.wanted = asked


def run(arguments, log, *, ranks, prepare=None):
    """Return what was said, and whether all ranks ended well."""
    running = RunningRanks([*arguments, "distributed.timeout_seconds=100"], log, ranks=ranks, prepare=prepare)
    try:
        for process in running.processes:
            process.join(600)
        return log.read_text(), [process.exitcode for process in running.processes] == [0] * ranks
    finally:
        running.kill()


def state_of(run_dir):
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return newest.name, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safet*")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=50, num_val=30, seed=0)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_a_combination_is_refused_or_stops_and_continues_without_a_trace(number, data, tmp_path):
    one, whole, parts = combinations()[number], tmp_path / "whole", tmp_path / "parts"
    ranks = int(one["ranks"])
    said, well = run(arguments(one, data, f"run_dir={whole}"), tmp_path / "log", ranks=ranks)
    if not well:
        assert "clip_train.errors.UserError" in said and not steps_done(whole), (one, said)
        return
    assert not [line for line in said.splitlines() if WARNING.search(line) and not EXPECTED.search(line)], (one, said)
    calls = random.Random(number).randrange(1, 9)
    for prepare in (partial(stop_after, calls), None):
        said, well = run(arguments(one, data, f"run_dir={parts}"), tmp_path / "log", ranks=ranks, prepare=prepare)
        assert well, (one, said)
    assert state_of(parts) == state_of(whole), one
    assert losses_of(parts) == losses_of(whole), one
    clip_train.load(str(whole), device="cpu")
    alike = "dropout" not in one["ragged"] and ("tiny-rn" not in one["model"] or LOCKED in one["vision"])
    if one["precision"] == "precision=fp32" and alike and "efficientnet" not in one["model"] + one["vision"]:
        plain = one | {"micro": "", "distributed": ""}
        said, well = run(arguments(plain, data, f"run_dir={tmp_path}/plain"), tmp_path / "log", ranks=1)
        assert well, (plain, said)
        got, want = losses_of(whole), losses_of(tmp_path / "plain")
        tolerance = 5e-2 if "bf16" in one["distributed"] else 2e-4
        assert max(abs(got[step] - want[step]) for step in want) <= tolerance, (one, got, want)
