"""A small file that is replaced is seen whole: the old one or the new one."""

import contextlib
import errno
import os
import stat

import pytest

from clip_train.files import hash_file, replace_file
from tests.checkpoint.faults import Disk, PowerLoss

OLD, NEW = b"old", "new, and écrit en UTF-8\n" * 9


@pytest.mark.parametrize("fail_at", range(1, 6))  # unlink, open, write, fsync, rename
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fail_at):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    disk = Disk(tmp_path, fail_at=fail_at, error=OSError(errno.ENOSPC, "No space left on device"))
    with disk.installed(monkeypatch), pytest.raises(OSError, match="No space"):
        replace_file(path, NEW)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_a_power_loss_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, fail_at):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    disk = Disk(tmp_path, fail_at=fail_at)
    with disk.installed(monkeypatch), contextlib.suppress(PowerLoss):
        replace_file(path, NEW)
    assert path.read_bytes() in (OLD, NEW.encode())


def test_a_shared_folder_that_cannot_flush_names_can_be_written(tmp_path, monkeypatch):
    flush = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    replace_file(tmp_path / "file", NEW)
    assert hash_file(tmp_path / "file").bytes == len(NEW.encode())
