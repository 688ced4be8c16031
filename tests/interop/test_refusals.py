"""Files that are wrong, truncated, hostile or of another model: one line that names the file, and nothing is run."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import clip_train
from clip_train.errors import ClipTrainError, IntegrityError, UserError
from clip_train.interop.torchscript import read_archive

from . import files


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Restoring(torch.nn.Module):
    """Loaded by TorchScript, it runs its own `__setstate__`."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.w = state[0]
        self.training = state[1]
        print("ran")


def archive(path, members, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def tiny_tensors():
    return files.small_model().state_dict()


def refused(path, *words, architecture=None):
    with pytest.raises(ClipTrainError) as caught:
        clip_train.load(path if architecture is None else f"{architecture}:{path}", device="cpu")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return caught.value


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605143316\n", "a Git LFS pointer"),
        (np.random.default_rng(0).bytes(4096), "not a readable weight file"),
    ],
)
def test_what_is_no_weight_file_is_said_to_be_what_it_is(tmp_path, suffix, content, words):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refused(path, words)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path, share):
    model = files.small_model()
    paths = [tmp_path / "a.pt", tmp_path / "b.safetensors", tmp_path / "c.pt"]
    torch.save(model.state_dict(), paths[0])
    save_file(model.state_dict(), paths[1])
    files.write_torchscript(model, paths[2])
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        refused(path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Touch(made), protocol=2))
    torch.save({"state_dict": {**tiny_tensors(), "x": Touch(made)}}, tmp_path / "zip.pt")
    torch.save(Touch(made), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    archive(
        tmp_path / "script.pt",
        {"a/data.pkl": pickle.dumps(Touch(made), protocol=2), "a/constants.pkl": b"", "a/version": b"3"},
    )
    for name in ("bare", "zip", "legacy", "script"):
        error = refused(tmp_path / f"{name}.pt", "unsafe pickle", "safetensors.torch.save_file")
        assert isinstance(error, UserError) and error.exit_code == 2
    assert not made.exists()


def test_a_bare_pickle_is_not_run_and_nobody_is_advised_to(tmp_path, recwarn):
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=4))
    error = refused(tmp_path / "bare.pt", "a pickle of more than tensors")
    assert "weights_only" not in str(error) and len(recwarn) == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("vision_cfg", "width", "no model of the sizes in its config can be made"),
        ("vision_cfg", "layers", "its config asks for 1,000,000,001 blocks, its weights are"),
        ("text_cfg", "vocab_size", "no model of the sizes in its config can be made"),
        ("text_cfg", "layers", "its config asks for"),
    ],
)
def test_a_config_of_absurd_sizes_is_refused_before_they_are_made(tmp_path, section, key, words):
    folder = files.write_open_clip_folder(files.small_model(), tmp_path / "huge")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][section][key] = 10**12 if key == "vocab_size" else 10**9
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"huge/open_clip_model\.safetensors: {words}.*first keys of the file: ln_final"
    ):
        clip_train.load(folder, device="cpu")


def test_the_code_of_an_archive_is_not_run(tmp_path, capfd):
    path = tmp_path / "restoring.pt"
    torch.jit.save(torch.jit.script(Restoring()), path)
    torch.jit.load(path)
    assert "ran" in capfd.readouterr().out  # torch does run it
    refused(path, "unsafe pickle", "code of its own")
    assert "ran" not in capfd.readouterr().out


def test_an_archive_gives_what_torchscript_gives(tmp_path):
    model = clip_train.create_model("tiny-rn", text={"width": 64, "heads": 1, "layers": 1})
    files.write_torchscript(model, tmp_path / "a.pt")
    theirs, ours = torch.jit.load(tmp_path / "a.pt").state_dict(), read_archive(tmp_path / "a.pt")
    assert list(ours) == list(theirs)
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_tensor_that_an_archive_does_not_register_stays_behind(tmp_path):
    module = torch.nn.Linear(2, 2)
    module.mask = torch.zeros(3)
    torch.jit.script(module).save(tmp_path / "a.pt")
    assert list(read_archive(tmp_path / "a.pt")) == ["weight", "bias"]


def test_a_container_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    bomb = archive(tmp_path / "bomb.pt", {"a/data.pkl": bytes(80 << 20)}, compression=zipfile.ZIP_DEFLATED)
    refused(bomb, "would unpack to 83,886,080 bytes")


def test_a_tensor_that_claims_more_than_it_has_is_refused(tmp_path):
    tensors = {**tiny_tensors(), "text_projection": torch.zeros(1, dtype=torch.float16).expand(1 << 20, 1 << 20)}
    torch.save(tensors, tmp_path / "huge.pt")
    refused(tmp_path / "huge.pt", "text_projection claims [1048576, 1048576]")


@pytest.mark.parametrize(
    "header",
    [
        (1 << 40).to_bytes(8, "little") + b"{}",
        (7).to_bytes(8, "little") + b'{"a":1}',
        (2).to_bytes(8, "little") + b"[]",
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}   ' + bytes(4),
        (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_safetensors_file_with_a_bad_or_empty_header_is_refused(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(header)
    refused(tmp_path / "x.safetensors")


def test_another_architecture_is_told_by_the_first_ten_keys(tmp_path):
    torch.save({f"layer.{i:02}.weight": torch.zeros(1) for i in range(12)}, tmp_path / "other.pt")
    ten = ", ".join(f"layer.{i:02}.weight" for i in range(10))
    listed = f"first keys of the file: {ten}, and 2 more"
    refused(tmp_path / "other.pt", listed, "12 unexpected", "missing (", architecture="tiny")
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "none.pt")
    refused(tmp_path / "none.pt", "no tensors by name", "its first keys: epoch, name")
    refused(tmp_path / "other.pt", f"as in ViT-B-32:{tmp_path}/other.pt", ten)


def test_transposed_tensors_are_told_by_both_shapes(tmp_path):
    tensors = {
        name: t.T.contiguous() if t.dim() == 2 else t
        for name, t in clip_train.create_model("tiny").state_dict().items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    refused(
        tmp_path / "x.safetensors",
        "positional_embedding [128, 77], not [77, 128]",
        "first keys of the file",
        architecture="tiny",
    )


def test_an_archive_of_another_model_is_not_taken_for_openais(tmp_path):
    integers = files.openai_integers(files.small_model())
    torch.save({"layer.weight": torch.zeros(2), **integers}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "not OpenAI's CLIP", "its first keys: layer.weight")
    torch.save({**tiny_tensors(), "positional_embedding": torch.zeros(3), **integers}, tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "not OpenAI's CLIP")


def test_weights_that_are_not_finite_are_damage(tmp_path):
    tensors = clip_train.create_model("tiny").state_dict()
    tensors["visual.proj"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "x.safetensors")
    assert isinstance(
        refused(tmp_path / "x.safetensors", "visual.proj holds values that are not finite", architecture="tiny"),
        IntegrityError,
    )


@pytest.mark.parametrize("name", ["open_clip_config.json", "config.json", "clip_train.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"model_cfg": 3}',
        '{"model_type": "bert"}',
        '{"model": {"embed_dim": "x"}}',
        "\xff",
        "[" * 100_000,
    ],
)
def test_a_folder_whose_config_is_damaged_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="latin-1")
    save_file(tiny_tensors(), tmp_path / "open_clip_model.safetensors")
    assert isinstance(refused(tmp_path), UserError)


def test_a_folder_with_nothing_known_lists_what_it_has(tmp_path):
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "neither a run or checkpoint nor a folder with", "it has notes.txt")


def test_an_index_cannot_reach_out_of_its_folder(tmp_path):
    from clip_train.interop.transformers import config_from_native, from_native

    model = files.small_model()
    save_file(from_native(model.state_dict(), model.config), tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_from_native(model.config)))
    index = folder / "model.safetensors.index.json"
    for name, word in (
        ("../outside.safetensors", "not a .safetensors file of this folder"),
        ("there.bin", "not a .safetensors file of this folder"),
        ("absent.safetensors", "absent.safetensors is not there"),
    ):
        index.write_text(json.dumps({"weight_map": {"logit_scale": name}}))
        refused(folder, word)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["zip.pt", "legacy.pt", "script.pt", "x.safetensors", "config.json", "open_clip_config.json"]
)
def test_a_file_with_any_bytes_changed_loads_or_is_refused(tmp_path, kind):
    from clip_train.interop.transformers import config_from_native, from_native

    small = {"vision": {"image_size": 32, "width": 64, "heads": 1, "layers": 1}}
    model = clip_train.create_model("tiny", **small, text={"vocab_size": 100, "width": 64, "heads": 1, "layers": 1})
    folder = tmp_path
    if kind.endswith("json"):
        folder = files.write_open_clip_folder(model, tmp_path / "folder")
        if kind == "config.json":
            (folder / "open_clip_config.json").unlink()
            (folder / kind).write_text(json.dumps(config_from_native(model.config)))
            save_file(from_native(model.state_dict(), model.config), folder / "model.safetensors")
    path = folder / kind
    state = {**model.state_dict(), **files.openai_integers(model)}
    if kind == "zip.pt":
        torch.save(state, path)
    elif kind == "legacy.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "script.pt":
        files.write_torchscript(model, path)
    elif kind == "x.safetensors":
        save_file(state, path)
    content = path.read_bytes()
    # Most bytes are weights; the interesting ones are names, sizes and instructions, at both ends.
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(300):
        changed = bytearray(content)
        for _ in range(1 + i % 3):
            near = int(rng.integers(0, min(len(content), 6000)))
            changed[near if i % 2 else len(content) - 1 - near] = int(rng.integers(0, 256))
        path.write_bytes(changed)
        try:
            clip_train.load(path if folder == tmp_path else folder, device="cpu")
        except ClipTrainError as error:
            refusals += 1
            assert str(folder) in str(error)
    assert refusals > 10
