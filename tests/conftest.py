"""Shared set-up: one thread per process, so that results do not depend on the machine's core count."""

import ctypes
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_SILENT", "true")
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:  # no GPU: kernels are interpreted, which Triton decides when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _single_thread():
    import torch

    torch.set_num_threads(1)
