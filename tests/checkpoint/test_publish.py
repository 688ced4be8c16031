"""Whatever the disk does and whenever, the last good checkpoint stays."""

import errno
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_train.checkpoint import checkpointer as checkpointer_module
from clip_train.checkpoint.load import newest_verified
from clip_train.checkpoint.publish import clear_leftovers
from clip_train.checkpoint.retention import list_checkpoints
from clip_train.checkpoint.safetensors_writer import safetensors_chunks
from clip_train.errors import ClipTrainError, UserError
from clip_train.files import write_file
from tests.checkpoint.faults import Disk, PowerLoss
from tests.checkpoint.parts import open_fixed, save_steps


def resumed_value(run_dir) -> tuple[int, float]:
    """Start as a new process does after a crash and return (step, value) of what it resumes from."""
    (run_dir / "lock").unlink(missing_ok=True)
    lines = []
    checkpointer, part = open_fixed(run_dir, lines=lines)
    with checkpointer:
        found = checkpointer.resume("auto").step, part.value
    assert not [line for line in lines if line.startswith("skipped")], "a half-written checkpoint was visible"
    return found


def save_with(disk, monkeypatch, run_dir, *, step, value):
    checkpointer, part = open_fixed(run_dir)
    checkpointer.resume("auto")
    part.fill(value)
    with disk.installed(monkeypatch):
        checkpointer.save(step=step, consumed=step, config_yaml="")
    checkpointer.close()


def test_a_power_loss_at_any_operation_of_a_save_leaves_the_new_or_the_previous_checkpoint(quick_path, monkeypatch):
    save_steps(quick_path / "before", 1, 2)
    fail_at = 0
    while True:
        fail_at += 1
        run_dir = quick_path / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(quick_path / "before", run_dir)
        disk = Disk(run_dir, fail_at=fail_at)
        try:
            save_with(disk, monkeypatch, run_dir, step=3, value=3.0)
        except PowerLoss:
            assert resumed_value(run_dir) in ((2, 2.0), (3, 3.0))
            assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
            save_steps(run_dir, 4)
            assert newest_verified(run_dir).name == "step-00000004"
        else:
            break
    # Open, write and flush of four files, more writes for the tensors, two directories, two renames, the deletion.
    assert fail_at > 20
    assert [p.name for p in list_checkpoints(run_dir)] == ["step-00000003", "step-00000002"]


def test_a_power_loss_while_the_only_checkpoint_is_replaced_leaves_the_old_or_the_new(quick_path, monkeypatch):
    save_steps(quick_path / "before", 1)
    fail_at = 0
    while True:
        fail_at += 1
        crashed = quick_path / "crashed"
        shutil.rmtree(crashed, ignore_errors=True)
        shutil.copytree(quick_path / "before", crashed)
        try:
            save_with(Disk(crashed, fail_at=fail_at), monkeypatch, crashed, step=1, value=100.0)
        except PowerLoss:
            restart_crashes_everywhere(crashed, quick_path / "again", monkeypatch)
            assert resumed_value(crashed) in ((1, 1.0), (1, 100.0))
        else:
            break
    assert fail_at > 20
    assert resumed_value(crashed) == (1, 100.0)


def restart_crashes_everywhere(crashed, copy, monkeypatch):
    """Lose power again at every operation of clearing up."""
    fail_at = 0
    while True:
        fail_at += 1
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(crashed, copy)
        try:
            with Disk(copy, fail_at=fail_at).installed(monkeypatch):
                clear_leftovers(copy / "checkpoints")
        except PowerLoss:
            assert resumed_value(copy) in ((1, 1.0), (1, 100.0))
        else:
            return


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_error_at_any_operation_keeps_training_and_the_older_checkpoints(quick_path, monkeypatch, number):
    lines = []
    run_dir = quick_path / "run"
    save_steps(quick_path / "before", 1, 2)
    fail_at = 0
    while True:
        fail_at += 1
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(quick_path / "before", run_dir)
        checkpointer, part = open_fixed(run_dir, lines=lines)
        checkpointer.resume("auto")
        part.fill(3)
        disk = Disk(run_dir, fail_at=fail_at, error=OSError(number, "injected", str(run_dir)))
        with disk.installed(monkeypatch):
            checkpointer.save(step=3, consumed=3, config_yaml="")
        part.fill(4)
        checkpointer.save(step=4, consumed=4, config_yaml="")
        checkpointer.close()
        assert resumed_value(run_dir) == (4, 4.0)
        assert len(list_checkpoints(run_dir)) >= 2
        if not disk.failed:
            break
        line = lines.pop()  # exactly one for each failure
        assert str(run_dir) in line
        if "could not be deleted" not in line and "is good, but that could not be written down" not in line:
            assert "older checkpoints stay (failure 1 of 3 in a row)" in line
            assert ("No space left" in line) == (number == errno.ENOSPC)
    assert fail_at > 20
    assert not lines


def test_a_full_disk_is_noticed_before_writing_and_stops_training_the_third_time(tmp_path, monkeypatch):
    lines = []
    checkpointer, _ = open_fixed(tmp_path, lines=lines, size=2**18)
    usage = shutil.disk_usage(tmp_path)
    with checkpointer:
        checkpointer.save(step=1, consumed=1, config_yaml="")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        checkpointer.save(step=2, consumed=2, config_yaml="")
        checkpointer.save(step=3, consumed=3, config_yaml="")
        with pytest.raises(ClipTrainError, match=r"No space left: 1\.3 MiB needed, 1\.0 MiB free"):
            checkpointer.save(step=4, consumed=4, config_yaml="")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert [line.split(" was")[0] for line in lines] == [f"{tmp_path}/checkpoints/step-0000000{n}" for n in (2, 3, 4)]


def test_a_disk_that_is_full_at_the_start_is_a_user_error_before_anything_is_trained(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=rf"run_dir={tmp_path} .*No space left: 1\.3 MiB needed, 1\.0 MiB free"):
        open_fixed(tmp_path, size=2**18)
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoints"], "the directory is given free again"


def test_a_save_that_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "MAX_SAVE_SECONDS", 0.1)
    hang = threading.Event()
    checkpointer, _ = open_fixed(tmp_path, asynchronous=True)
    monkeypatch.setattr(checkpointer._commits, "commit", lambda snapshot, healthy: hang.wait(60))
    with checkpointer:
        checkpointer.save(step=1, consumed=1, config_yaml="")
        with pytest.raises(ClipTrainError, match="a checkpoint was not written within 0 minutes"):
            checkpointer.wait()
    hang.set()


def test_a_failed_last_save_is_an_error_although_training_could_go_on(tmp_path, monkeypatch):
    lines = []
    checkpointer, _ = open_fixed(tmp_path, lines=lines, asynchronous=True)
    usage = shutil.disk_usage(tmp_path)
    with checkpointer:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        checkpointer.save(step=1, consumed=1, config_yaml="")
        with pytest.raises(ClipTrainError, match="was not saved"):
            checkpointer.wait()
        checkpointer.save(step=2, consumed=2, config_yaml="")
    assert len(lines) == 3
    assert lines[2].startswith("the last save failed: ")  # nobody waited, so closing says it


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tensors_with_nan_or_inf_are_never_saved(tmp_path, asynchronous):
    checkpointer, part = open_fixed(tmp_path, asynchronous=asynchronous)
    part.fill(1)
    with checkpointer:
        checkpointer.save(step=1, consumed=1, config_yaml="")
        part.tensors["a"][500] = float("nan")
        part.tensors["c"].fill_(float("-inf"))
        with pytest.raises(ClipTrainError, match="step 2 was not saved, NaN or Inf in model: a; model: c"):
            checkpointer.save(step=2, consumed=2, config_yaml="")
            checkpointer.wait()
        part.fill(3)
        checkpointer.save(step=3, consumed=3, config_yaml="")
    assert resumed_value(tmp_path) == (3, 3.0)


def test_saving_the_same_step_again_changes_nothing_on_disk(tmp_path):
    save_steps(tmp_path, 5)
    path = tmp_path / "checkpoints" / "step-00000005"
    before = path.stat().st_ino
    save_steps(tmp_path, 5)
    assert path.stat().st_ino == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path):
    save_steps(tmp_path, 5)
    weights = tmp_path / "checkpoints" / "step-00000005" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    save_steps(tmp_path, 5)
    assert resumed_value(tmp_path) == (5, 5.0)


def test_files_equal_those_of_the_safetensors_library(tmp_path):
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {f"t{i}.é": torch.randn(i + 1, 3).mul(50).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "flags": torch.tensor([True, False])}
    tensors["turned"] = torch.randn(4, 6).t()
    write_file(tmp_path / "ours.safetensors", chunks=safetensors_chunks(tensors))
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_a_checkpoint_holds_the_files_of_the_layout_and_says_where_it_came_from(tmp_path):
    save_steps(tmp_path, 12)
    path = tmp_path / "checkpoints" / "step-00000012"
    names = {"model.safetensors", "train_state.json", "config.yaml"}
    assert {p.name for p in path.iterdir()} == names | {"MANIFEST.json"}
    assert json.loads((path / "train_state.json").read_text()) == {"step": 12, "consumed": 96, "counter": {"value": 7}}
    assert (path / "config.yaml").read_text() == "steps: 9\n"
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["files"].keys() == names
    assert (manifest["format"], manifest["step"], manifest["consumed"], manifest["world"]) == (2, 12, 96, 1)
    assert manifest["torch"] == torch.__version__
