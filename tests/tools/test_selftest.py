"""The self-test passes where the promises hold, and fails where one does not."""

import random
import subprocess
import sys

import pytest

from clip_train.checkpoint.retention import list_checkpoints
from clip_train.tools.selftest import command, saves


def test_damage_that_nobody_sees_fails_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(saves, "DAMAGES", 20)
    assert saves.check_damage(tmp_path / "sound", random.Random(0)).startswith("20 of 20 flipped bits and ")
    monkeypatch.setattr(saves, "newest_verified", lambda run_dir, say=print: list_checkpoints(run_dir)[0])
    with pytest.raises(AssertionError, match="was not seen"):
        saves.check_damage(tmp_path / "blind", random.Random(0))


def test_a_check_that_fails_is_told_and_makes_the_command_fail(tmp_path, monkeypatch, capsys):
    def broken(folder, rng):
        raise AssertionError(f"drew {rng.randrange(100)} in {folder.name}")

    checks = (
        command.Check(number="1", text="holds", run=lambda folder, rng: "as promised"),
        command.Check(number="2", text="does not", run=broken),
    )
    monkeypatch.setattr(command, "CHECKS", checks)
    assert command.selftest(seed=5, keep=tmp_path) == 1
    first = capsys.readouterr().out
    assert "as promised" in first and "FAILED: drew" in first and "1 of 2 checks failed" in first
    monkeypatch.setattr(command, "CHECKS", checks[:1])
    assert command.selftest(seed=None, keep=tmp_path / "again") == 0
    assert "all 1 checks passed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_self_test_passes_on_this_machine():
    ended = subprocess.run(
        [sys.executable, "-m", "clip_train", "selftest", "reliability", "--seed", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "all 5 checks passed" in ended.stdout
