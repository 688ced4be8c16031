"""Every damaged bit is seen, and the previous checkpoint loads instead."""

import json
import random
import shutil

import pytest

from clip_train.checkpoint.load import find_checkpoint, load_tensors, newest_verified
from clip_train.checkpoint.manifest import _canonical, verify
from clip_train.checkpoint.retention import list_checkpoints
from clip_train.errors import IntegrityError, UserError
from tests.checkpoint.parts import open_fixed, save_steps


@pytest.fixture
def run_dir(quick_path):
    return two_checkpoints(quick_path / "run")


def two_checkpoints(run_dir):
    """Write a run with two checkpoints of some 20 KB."""
    save_steps(run_dir, 1, 2, size=5000)
    return run_dir


def newest(run_dir):
    return run_dir / "checkpoints" / "step-00000002"


def assert_falls_back(run_dir, *, file):
    lines = []
    assert newest_verified(run_dir, say=lines.append).name == "step-00000001"
    assert len(lines) == 1
    assert lines[0].startswith(f"skipped step-00000002: {file} ")


def test_truncation_at_every_4_kb_and_at_100_random_places_is_detected(run_dir):
    generator = random.Random(0)
    for path in sorted(newest(run_dir).iterdir()):
        whole = path.read_bytes()
        places = {*range(0, len(whole), 4096), *(generator.randrange(len(whole)) for _ in range(25)), len(whole) - 1}
        for place in places:
            path.write_bytes(whole[:place])
            assert_falls_back(run_dir, file=path.name)
        path.write_bytes(whole)
    assert newest_verified(run_dir) == newest(run_dir)


def damage_once(run_dir, *, seed, resume):
    """Flip a bit of the newest checkpoint, or cut a file (one time in ten), fall back to the one before, and repair."""
    generator = random.Random(seed)
    paths = sorted(newest(run_dir).iterdir())
    path = paths[seed % len(paths)]
    whole = path.read_bytes()
    place = generator.randrange(len(whole))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << generator.randrange(8)
    path.write_bytes(whole[:place] if generator.random() < 0.1 else damaged)
    assert_falls_back(run_dir, file=path.name)
    if resume:
        checkpointer, part = open_fixed(run_dir, size=5000)
        with checkpointer:
            assert checkpointer.resume("auto").step == 1 and part.value == 1.0
    path.write_bytes(whole)


def test_300_random_bit_flips_and_cuts_are_detected_in_every_file_the_manifest_included(run_dir):
    for seed in range(300):
        damage_once(run_dir, seed=seed, resume=seed % 30 == 0)
    assert newest_verified(run_dir) == newest(run_dir)


@pytest.mark.slow
def test_10000_random_bit_flips_and_cuts_are_detected(run_dir):
    for seed in range(10_000):
        damage_once(run_dir, seed=seed, resume=True)


@pytest.mark.parametrize("name", ["MANIFEST.json", "model.safetensors", "train_state.json"])
def test_a_missing_file_is_detected(run_dir, name):
    (newest(run_dir) / name).unlink()
    assert_falls_back(run_dir, file=name)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_scratch_by_itself(run_dir):
    for path in list_checkpoints(run_dir):
        (path / "model.safetensors").write_bytes(b"")
    lines = []
    checkpointer, _ = open_fixed(run_dir, lines=lines)
    with checkpointer, pytest.raises(IntegrityError, match=r"none of 2 checkpoints is intact.*resume=never"):
        checkpointer.resume("auto")
    assert len(lines) == 2
    checkpointer, _ = open_fixed(run_dir)
    with checkpointer:
        assert checkpointer.resume("never") is None


def test_a_damaged_checkpoint_asked_for_by_path_is_an_error_not_a_fall_back(run_dir):
    (newest(run_dir) / "model.safetensors").write_bytes(b"")
    checkpointer, _ = open_fixed(run_dir)
    with checkpointer, pytest.raises(IntegrityError, match=r"step-00000002: model.safetensors has 0 bytes, not"):
        checkpointer.resume(str(newest(run_dir)))


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"null", b'{"format": 1}', b"\xff\xfe", b'"' * 100])
def test_a_manifest_that_is_none_is_damage(run_dir, raw):
    (newest(run_dir) / "MANIFEST.json").write_bytes(raw)
    assert_falls_back(run_dir, file="MANIFEST.json")


def test_a_manifest_cannot_point_out_of_its_checkpoint(run_dir):
    path = newest(run_dir) / "MANIFEST.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    values["files"]["../../lock"] = {"bytes": 1, "sha256": "0"}
    path.write_bytes(_canonical(values))
    with pytest.raises(IntegrityError, match="lock is no name of a file"):
        verify(newest(run_dir))


def test_find_checkpoint_takes_a_run_or_a_checkpoint_and_explains_what_it_cannot_take(run_dir, tmp_path):
    assert find_checkpoint(run_dir) == newest(run_dir)
    assert find_checkpoint(newest(run_dir)) == newest(run_dir)
    with pytest.raises(UserError, match="no such checkpoint or run directory"):
        find_checkpoint(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="neither a run directory"):
        find_checkpoint(tmp_path / "other")
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in this run"):
        find_checkpoint(run_dir)


def test_load_tensors_names_a_part_that_is_not_there(run_dir):
    assert load_tensors(newest(run_dir), "model").keys() == {"a", "b", "c"}
    with pytest.raises(UserError, match=r"no ema\.safetensors"):
        load_tensors(newest(run_dir), "ema")
