"""What hangs, crashes or takes all memory in a process of its own costs a sample and not the worker."""

import faulthandler
import os
import signal
import time

import numpy as np
import pytest
import torch

from clip_train.data import apart
from clip_train.data.images.decode import BadSampleError


def _compute():
    while True:
        pass


def _crash():
    faulthandler.disable()  # pytest's own: the crash is meant
    os.kill(os.getpid(), signal.SIGSEGV)


def _refuse():
    raise BadSampleError("too_small")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        pytest.param(_compute, "too_slow", marks=pytest.mark.slow),
        (lambda: time.sleep(60), "too_slow"),
        (_crash, "decoder_crashed"),
        (lambda: os._exit(3), "decoder_crashed"),
        (lambda: 1 / 0, "decoder_crashed"),
        (lambda: bytearray(6 << 30), "out_of_memory"),
        (_refuse, "too_small"),
    ],
    ids=["computes", "sleeps", "crashes", "exits", "raises", "allocates", "refuses"],
)
def test_whatever_happens_apart_is_a_reason(monkeypatch, act, reason):
    monkeypatch.setattr(apart, "CPU_SECONDS", 1)
    monkeypatch.setattr(apart, "_WALL_SECONDS", 0.5 if reason == "too_slow" and act is not _compute else 60)
    with pytest.raises(BadSampleError) as refused:
        apart.run_apart(act)
    assert refused.value.reason == reason


@pytest.mark.parametrize(("act", "ended_by"), [(_compute, signal.SIGPROF), (lambda: time.sleep(0.1), 0)])
def test_what_computes_too_long_ends_its_process_and_nothing_else_does(monkeypatch, act, ended_by):
    monkeypatch.setattr(apart, "CPU_SECONDS", 0.05)
    child = os.fork()
    if child == 0:
        apart.run_bounded(act)
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == ended_by


def test_what_was_computed_apart_is_in_shared_memory():
    storage = torch.UntypedStorage._new_shared(4)
    row = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    apart.run_apart(lambda: np.copyto(row, np.uint8([1, 2, 3, 4])))
    assert row.tolist() == [1, 2, 3, 4]
