"""The errors a user sees, each with the exit code of `clip-train`, and what their messages have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ClipTrainError(Exception):
    """An error whose message is meant for the user: printed on one line, without a traceback."""

    exit_code = 1


class UserError(ClipTrainError):
    """A mistake in a config, a path, a flag or the environment. Exit code 2."""

    exit_code = 2


class CaptionTooLong(UserError, RuntimeError):
    """A caption has more tokens than the context; OpenAI CLIP raises a RuntimeError for it."""


class IntegrityError(ClipTrainError):
    """Damaged or changed data, or a damaged checkpoint. Exit code 3."""

    exit_code = 3


class TrainingFailed(ClipTrainError):
    """The run cannot go on: non-finite numbers, a dead peer, no memory. Exit code 1."""

    exit_code = 1


class Stopped(ClipTrainError):
    """The user asked for the end, by Ctrl-C or `max_hours`, when nothing was there to be saved. Exit code 0."""

    exit_code = 0


class Preempted(ClipTrainError):
    """The run was asked to stop and saved everything: start it again. Exit code 85."""

    exit_code = 85


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn what can go wrong with a file that is read within into a user's error about `what`.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text (byte {error.start}): convert it first") from error


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn what can go wrong with files that are written within into a user's error about `what`.

    Raises:
        UserError: they cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from error


def first_of(items: Iterable[object], *, most: int = 10, between: str = ", ") -> str:
    """Return the first items for a message, and how many more there are."""
    listed = list(items)
    rest = [f"and {len(listed) - most:,} more"] if len(listed) > most else []
    return between.join([*map(str, listed[:most]), *rest])
