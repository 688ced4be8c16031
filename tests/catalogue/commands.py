"""Call the command line in this process, as its entry point does."""

import contextlib
import io
import logging
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from clip_train import cli


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


def clip_train(*arguments: object) -> Done:
    """Call `clip-train` with arguments."""
    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    # Where nothing is set up, warnings go to standard error; pytest has set up its own.
    warnings = logging.StreamHandler(err)
    warnings.setLevel(logging.WARNING)
    logging.getLogger().addHandler(warnings)
    sys.argv = ["clip-train", *map(str, arguments)]
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    except Exception:  # what main lets through, Python prints as a traceback and ends with 1
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = given
        logging.getLogger().removeHandler(warnings)
    return Done(code, out.getvalue(), err.getvalue())


def train(shards: Path | str, run_dir: Path, *arguments: object) -> Done:
    """Call `clip-train train` on a tiny model for four steps; the last arguments win."""
    return clip_train(
        "train", f"data.train={shards}", f"run_dir={run_dir}", "model=tiny", "data.workers=0", "device=cpu",
        "precision=fp32", "steps=4", "global_batch_size=12", "optim.warmup=1", "checkpoint.every=2", *arguments,
    )  # fmt: skip
