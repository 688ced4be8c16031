"""A device without memory: the run ends with what would fit, and that does fit."""

import pytest
import torch

from clip_train.config import load
from clip_train.errors import TrainingFailed
from clip_train.health.events import read_events
from clip_train.health.memory import fitting_micro_batch
from clip_train.model.clip import CLIP
from clip_train.train import train
from tests.health.test_runs import scenes  # noqa: F401 - a fixture
from tests.test_train import overrides

GIB = 2**30


@pytest.mark.parametrize(
    ("rows", "size", "fixed", "peak", "capacity", "expected"),
    [
        (4096, 4096, 4 * GIB, 80 * GIB, 80 * GIB, 1024),  # 76 GiB so far, 152 in all: 2048 rows would take 76
        (4096, 4096, 4 * GIB, 40 * GIB, 80 * GIB, 2048),
        (12, 12, 0, 0, 0, 6),  # nothing is known: half
        (9, 9, 0, 0, 0, 3),
        (7, 7, 0, 0, 0, 1),
        (4, 1, 0, 0, 0, None),
        (64, 64, 79 * GIB, 81 * GIB, 80 * GIB, None),  # the weights alone fill it
    ],
)
def test_the_proposed_micro_batch(rows, size, fixed, peak, capacity, expected):
    found = fitting_micro_batch(rows, micro_batch_size=size, fixed=fixed, peak=peak, capacity=capacity)
    assert found == expected


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_says_what_fits_and_that_fits(scenes, tmp_path, monkeypatch):  # noqa: F811
    forward = CLIP.forward

    def with_limit(self, images, *rest):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand pages of advice")
        return forward(self, images, *rest)

    monkeypatch.setattr(CLIP, "forward", with_limit)
    size = None
    for expected in (6, 3):
        with pytest.raises(TrainingFailed, match=f"micro_batch_size={expected} should fit") as failure:
            given = [] if size is None else [f"micro_batch_size={size}"]
            train(load("train", overrides(scenes, tmp_path, "steps=2", "optim.warmup=1", *given)))
        assert "in step 1" in str(failure.value) and "12 pairs" in str(failure.value)
        assert "2.00 GiB" in str(failure.value) and "advice" not in str(failure.value)
        assert failure.value.exit_code == 1
        size = expected
    train(load("train", overrides(scenes, tmp_path, "steps=2", "optim.warmup=1", f"micro_batch_size={size}")))
    assert [event["kind"] for event in read_events(tmp_path)] == ["out_of_memory"] * 2
