"""What the README shows is true: its Python runs, its commands compose, its files exist."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from clip_train.cli import app
from clip_train.config import load
from clip_train.data.scenes.write import write_scenes
from clip_train.tools.grid import expand
from clip_train.train import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command line of the README's shell blocks and tables, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    lines += re.findall(r"`((?:clip-train|torchrun) [^`]*)`", README)
    return [shlex.split(line) for line in lines if re.match(r"(clip-train|torchrun) ", line)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write_scenes(folder / "scenes", num_train=16, num_val=4, seed=0)
    settings = ["model=tiny", "steps=2", "global_batch_size=8", "optim.warmup=1", "data.workers=0", "precision=fp32"]
    train(load("train", [*settings, f"data.train={folder}/scenes/train", f"run_dir={folder}/run", "device=cpu"]))
    return folder / "run"


def test_the_snippet_every_tutorial_shows_runs_against_a_run(run_dir, tmp_path, capsys):
    for name in ("photo.png", "a.png", "b.png"):
        Image.new("RGB", (80, 60), "red").save(tmp_path / name)
    values = {}
    for snippet in blocks("python"):  # the second one goes on where the first one ends
        exec(
            re.sub(r"\w+\.png", lambda name: str(tmp_path / name[0]), snippet.replace("runs/demo", str(run_dir))),
            values,
        )
    assert capsys.readouterr().out.startswith("Label probs: [[")
    assert values["image_features"].norm(dim=-1).allclose(values["image_features"].new_ones(1))
    cosines = values["image_features"] @ values["text_features"].T
    assert values["logits_per_image"].allclose(values["model"].logit_scale.exp() * cosines, atol=1e-5)
    assert len(values["steps"]) == len(values["losses"]) > 0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_exists(words):
    start = words.index("clip-train" if "clip-train" in words else "clip_train")
    name, *arguments = words[start + 1 :]
    assert name in {command.name or command.callback.__name__ for command in app.registered_commands} | {
        group.name for group in app.registered_groups
    }
    if "-m" in arguments:
        assert expand([one for one in arguments if one != "-m"])
    elif name in {"train", "evaluate"} and "..." not in arguments and not {"--help", "--cfg"} & set(arguments):
        load(name, arguments)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 320
