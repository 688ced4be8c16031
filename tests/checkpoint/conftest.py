"""Where these tests write."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory where there is one: these tests flush thousands of times, to a disk that is made up anyway."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
