"""Catalogue of bad input, items 46 to 55: checkpoints and weights of others."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_train.checkpoint.manifest import FORMAT, MANIFEST_NAME, _canonical
from tests.catalogue import commands
from tests.catalogue.commands import clip_train
from tests.interop.test_refusals import Touch
from tests.tokenizer.made import write_bpe

catalogue = pytest.mark.catalogue
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    commands.train(shards / "train", run_dir, "optim.schedule=constant").worked()
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A run of four steps with checkpoints at 2 and 4, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def newest(run_dir):
    return run_dir / "checkpoints" / "step-00000004"


@pytest.fixture
def go_on(train):
    return lambda *arguments: train("optim.schedule=constant", "steps=6", *arguments)


@catalogue(46)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_by_name_and_none_left_is_an_error(run_dir, go_on, damage):
    def spoil(folder):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content if damage == "flipped" else content[:-1000])

    spoil(newest(run_dir))
    go_on().worked("skipped", "step-00000004", "model.safetensors", "continuing", "step-00000002")
    for folder in (run_dir / "checkpoints").glob("step-*"):
        spoil(folder)
    go_on("steps=8").refused(3, run_dir, "model.safetensors")


@catalogue(47)
def test_a_pickle_that_runs_code_is_refused_with_the_way_to_convert_it(tmp_path, train):
    ran = tmp_path / "ran"
    torch.save({"state_dict": Touch(ran)}, tmp_path / "evil.pt")
    for done in (
        train(f"model.init={tmp_path}/evil.pt"),
        clip_train("evaluate", f"checkpoint={tmp_path}/evil.pt"),
        clip_train("export", tmp_path / "evil.pt"),
        clip_train("classify", "x.png", "--labels", "a,b", "--model", tmp_path / "evil.pt"),
    ):
        done.refused(2, tmp_path / "evil.pt", "unsafe pickle", "save_file(state_dict, 'model.safetensors')")
    assert not ran.exists()


@catalogue(48)
def test_weights_of_another_architecture_are_listed(finished, tmp_path, train):
    weights = load_file(newest(finished) / "model.safetensors")
    weights["extra"] = weights.pop("visual.proj")
    weights["text_projection"] = weights["text_projection"].T[:5].contiguous()
    save_file(weights, tmp_path / "w.safetensors")
    train(f"model.init={tmp_path}/w.safetensors").refused(
        2, tmp_path / "w.safetensors", "1 missing: visual.proj", "1 unexpected: extra", "1 of another shape",
        "text_projection",
    )  # fmt: skip


@catalogue(49)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_wherever_weights_are_read(finished, tmp_path, train, prefix):
    weights = load_file(newest(finished) / "model.safetensors")
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in weights.items()}}, tmp_path / "w.pt")
    train(f"model.init={tmp_path}/w.pt").worked("starting from", f"loaded            {len(weights)} tensors")
    clip_train("export", f"tiny:{tmp_path}/w.pt", "--to", "folder", "--out", tmp_path / "out").worked()


@catalogue(50)
def test_half_precision_weights_load_and_an_average_that_is_not_there_is_named(
    finished, run_dir, tmp_path, train, go_on
):
    weights = load_file(newest(finished) / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.safetensors")
    train(f"model.init={tmp_path}/half.safetensors", f"run_dir={tmp_path}/half").worked("starting from")
    clip_train("export", finished, "--weights", "ema", "--to", "folder").refused(2, finished, "ema")


@catalogue(51)
def test_positions_of_another_size_are_interpolated_with_a_line(finished, tmp_path, train):
    done = train(
        f"model.init={newest(finished)}/model.safetensors", "model.vision.image_size=96", f"run_dir={tmp_path}/large"
    )
    done.worked("interpolated", "visual.positional_embedding")


@catalogue(52)
def test_another_vocabulary_is_refused_with_both_sizes(finished, tmp_path, train):
    path = write_bpe(tmp_path / "tokenizer.json")
    done = train(
        f"model.init={newest(finished)}/model.safetensors", "tokenizer=huggingface", f"tokenizer.path={path}",
        "tokenizer.bos=<s>", "tokenizer.eos=</s>",
    )  # fmt: skip
    done.refused(2, "token_embedding.weight")


@catalogue(53)
@pytest.mark.parametrize("left", [(), (".part-step-00000002-99999999",)])
def test_an_empty_run_directory_is_a_fresh_start_that_says_so(train, tmp_path, left):
    for name in left:
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    train().worked(tmp_path / "run", "starting from scratch")


@catalogue(54)
def test_a_newer_format_is_refused_with_both_versions(run_dir, go_on):
    path = newest(run_dir) / MANIFEST_NAME
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_bytes(_canonical({**values, "format": FORMAT + 1}))
    go_on().refused(2, path, f"format {FORMAT + 1}", f"up to {FORMAT}")


@catalogue(55)
def test_a_checkpoint_of_another_run_in_the_directory_is_refused(run_dir, go_on, shards, tmp_path):
    other = ("model.vision.width=96", "model.vision.heads=3", "optim.schedule=constant")
    commands.train(shards / "train", tmp_path / "other", *other).worked()
    shutil.rmtree(newest(run_dir))
    shutil.copytree(newest(tmp_path / "other"), newest(run_dir))
    go_on().refused(2, newest(run_dir), "model.vision.width: 96 -> 128")


@catalogue(49)
def test_a_zip_that_is_no_archive_of_weights_is_refused(tmp_path, train):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00exit\x85R.")
    (tmp_path / "w.pt").write_bytes(buffer.getvalue())
    train(f"model.init={tmp_path}/w.pt").refused(2, tmp_path / "w.pt")
