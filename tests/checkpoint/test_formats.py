"""Checkpoints of every format that there ever was are read, and newer ones are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clip_train.checkpoint.load import newest_verified
from clip_train.checkpoint.manifest import FORMAT, MANIFEST_NAME, _canonical
from clip_train.errors import UserError
from tests.checkpoint.parts import Model, adamw, open_training, train

KEPT = Path(__file__).parent / "formats"
"""By format, a run of three steps of the small model as the version of its time wrote it; 2 by two FSDP2 ranks."""


def stated_format(run_dir: Path) -> int:
    return json.loads((newest_verified(run_dir) / MANIFEST_NAME).read_text())["format"]


def test_a_checkpoint_of_each_format_is_kept():
    assert {int(path.name): stated_format(path) for path in KEPT.iterdir()} == {n: n for n in range(1, FORMAT + 1)}


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_training_continues_from_every_format(tmp_path, number):
    shutil.copytree(KEPT / str(number), tmp_path, dirs_exist_ok=True)
    expected = Model()
    train(expected, adamw(expected), steps=range(5))
    model = Model(seed=9)
    optimizer = adamw(model)
    with open_training(tmp_path, model, optimizer) as checkpointer:
        assert checkpointer.resume("auto").step == 3
    train(model, optimizer, steps=range(3, 5))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_a_newer_format_is_named_and_never_passed_over(tmp_path):
    shutil.copytree(KEPT / "1", tmp_path, dirs_exist_ok=True)
    path = newest_verified(tmp_path) / MANIFEST_NAME
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_bytes(_canonical({**values, "format": FORMAT + 1, "unknown": []}))
    with pytest.raises(UserError, match=rf"MANIFEST.json: format {FORMAT + 1}, this clip-train reads up to {FORMAT}"):
        newest_verified(tmp_path)
