"""The command line as a user meets it, called in this process, and a set of shards to give it."""

import sys
import traceback
from typing import NamedTuple

import pytest

from clip_train import cli
from tests.data.made import numbered_shards


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str  # what a person reads beside the results: standard error and warnings

    def refused(self, code: int, *parts: object) -> None:
        """Assert that it ended with `code`, a message that holds every one of `parts`, and no traceback."""
        assert (self.code, "Traceback" in self.err) == (code, False), self.err
        message = self.err[self.err.index("error") :]
        missing = [part for part in parts if str(part) not in message]
        assert not missing, f"{missing} not in: {message}"

    def worked(self, *parts: object) -> None:
        """Assert that it ended well and said every one of `parts`."""
        assert (self.code, "Traceback" in self.err) == (0, False), self.err
        missing = [part for part in parts if str(part) not in self.err + self.out]
        assert not missing, f"{missing} not in: {self.out}{self.err}"


@pytest.fixture
def clip_train(monkeypatch, capsys, caplog):
    """Call `clip-train` with arguments as its entry point does."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["clip-train", *map(str, arguments)])
        capsys.readouterr()
        caplog.clear()
        code = None
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # what main lets through, Python prints as a traceback and ends with 1
            code = 1
            traceback.print_exc()
        out, err = capsys.readouterr()
        return Done(code, out, caplog.text + err)

    return call


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two shards of 60 and a folder beside them with one of 20."""
    folder = tmp_path_factory.mktemp("catalogue")
    numbered_shards(folder / "train", [60, 60])
    numbered_shards(folder / "val", [20])
    return folder


@pytest.fixture
def train(clip_train, shards, tmp_path):
    """Call `clip-train train` on a tiny model for four steps; arguments come last and win."""

    def call(*arguments: object) -> Done:
        return clip_train(
            "train", f"data.train={shards}/train", f"run_dir={tmp_path}/run", "model=tiny", "data.workers=0",
            "device=cpu", "precision=fp32", "steps=4", "global_batch_size=12", "optim.warmup=1", "checkpoint.every=2",
            *arguments,
        )  # fmt: skip

    return call
