"""Where these tests write."""

import os
import tempfile
from pathlib import Path

import pytest


def memory_folder() -> str | None:
    """Return a folder in memory, None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def quick_path():
    """A folder in memory where there is one: these tests flush thousands of times, to a disk that is made up anyway."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)
