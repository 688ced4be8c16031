"""The command line answers fast, explains itself, and refuses mistakes without a traceback."""

import resource
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from clip_train.cli import app
from clip_train.cli_examples import EXAMPLES
from clip_train.config import load, to_yaml
from clip_train.errors import UserError
from clip_train.help import explain
from tests.catalogue import commands


def clip_train(*arguments):
    """Return the finished process, the modules it imported, and its processor seconds, whatever else runs meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "clip_train", *arguments], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time"))
    return done, imported, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.catalogue(17)
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"], ["help", "optim.lr"], ["shards", "--help"]]
)
def test_help_answers_without_importing_torch(arguments):
    done, imported, seconds = clip_train(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "torch" not in imported
    assert seconds < 1.0


def test_help_of_train_names_every_key_with_an_explanation():
    keys = ("optim.lr=", "global_batch_size=", "checkpoint.every=", "model=", "data.train=")
    commands.clip_train("train", "--help").worked("experiment=demo", *keys)


def test_the_help_of_each_tool_begins_with_three_commands_that_it_takes():
    root = typer.main.get_command(app)
    tools = {name: one for name, one in root.commands.items() if name not in ("train", "evaluate", "sweep", "plan")}
    for group in ("shards", "runs", "tokenizer", "selftest"):
        tools |= {f"{group} {name}": one for name, one in tools.pop(group).commands.items()}
    assert tools.keys() == EXAMPLES.keys()
    for name, tool in tools.items():
        examples = [line for line in EXAMPLES[name].splitlines() if line.startswith(f"clip-train {name}")]
        assert len(examples) == 3 and tool.help.index(examples[0]) < 200
        for example in examples:
            tool.make_context(name, shlex.split(example)[1 + len(name.split()) :])  # an unknown option is an error


def test_help_of_a_key_knows_its_namesakes_names_of_evaluations_values_and_what_is_below():
    assert "What to evaluate" in explain("checkpoint") and "checkpoint.every=1000" in explain("checkpoint")
    assert explain("evaluation.mine.every") == explain("evaluation.NAME.every")
    assert "One of fp32, bf16, fp16." in explain("precision")
    assert "loss= chooses one of clip, siglip" in explain("loss") and "loss.name=" not in explain("loss")
    assert explain("optim.lr").count("optim.lr") == 1


def test_a_flag_beside_cfg_or_a_grid_is_not_passed_over():
    runner = CliRunner()
    for arguments in (["train", "--cfg", "--config-name=x"], ["train", "-m", "seed=0,1", "--cfg"]):
        with pytest.raises(UserError, match="--c"):
            runner.invoke(app, arguments, standalone_mode=False, catch_exceptions=False)
    assert "seed=0,1" in runner.invoke(app, ["train", "-m", "--help"]).output


MISTAKES = [
    ("optim.lrr=1", "optim.lr"),
    ("otpim.lr=1", "optim.lr"),
    ("global_batchsize=8", "global_batch_size"),
    ("data.trian=x", "data.train"),
    ("evaluation.val.evry=3", "evaluation.val.every"),
    ("model=ViT-B-33", "ViT-B-32"),
    ("experiment=dmeo", "demo"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr=-1", "optim.lr=-1"),
    ("steps=0", "steps=0"),
    ("precision=fp17", "precision"),
    ("loss=clap", "clip"),
    ("loss=siglip", "model.init_logit_bias"),
    ("+foo=3", "foo"),
    ("optim.warmup=900", "optim.warmup=900 must be below steps=500"),
    ("epochs=2", "exactly one of"),
    ("seed=${nope}", "nope"),
    ("wandb_api_key=x", "wandb_api_key"),
    ("loss._target_=os.system", "_target_"),
    ("launch.processes=2", "launch.processes is a key of launch=local"),
    ("evaluation.imagenet.root=x", "+evaluation=[imagenet]"),
    ("checkpoint=x", "checkpoint.every"),
    ("samples=1e9", "write samples=1000000000"),
    ("name=a,b", "several values"),
    ("name=range(1,3)", "train -m"),
    ("~optim.lr", "~optim.lr: only evaluations can be taken away"),
    ("+optim.lr=3", "leave out the +"),
    ("+model=tiny", "leave out the +"),
    ("suite=imagenet", "it is one of `clip-train evaluate`"),
    ("model=null", "choose one of"),
    ("evaluation=null", "[] for none"),
    ("model=[tiny,demo]", "not a list"),
    ("hydra.run.dir=x", "no effect"),
    ("hydra/launcher=joblib", "no effect"),
    ("optim.lr=1e400", "optim.lr=inf: numbers must be finite"),
    ("seed=-1", "seed=-1 must lie in"),
    ("run_dir=", "run_dir= must not be empty"),
    ("name=", "name= must not be empty"),
]


@pytest.mark.parametrize(("override", "expected"), MISTAKES)
def test_a_mistake_is_refused_in_one_line_with_the_right_key(override, expected):
    with pytest.raises(UserError) as refused:
        load("train", ["steps=500", "data.train=nowhere", override])
    assert expected in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_key_of_another_kind_of_evaluation_names_the_kind():
    with pytest.raises(UserError, match="val is of the kind retrieve, which has no root"):
        load("train", ["experiment=demo", "evaluation.val.root=x"])


def test_a_misspelt_key_ends_the_command_in_under_two_seconds_without_torch():
    done, imported, seconds = clip_train("train", "steps=500", "optim.lrr=1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'optim.lrr': did you mean 'optim.lr'?"
    assert "torch" not in imported
    assert seconds < 2.0


def test_cfg_prints_a_config_that_reads_back():
    given = ["steps=5", "optim.warmup=1", "data.train=x"]
    assert commands.clip_train("train", *given, "--cfg").out == to_yaml(load("train", given))
