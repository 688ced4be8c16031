"""The errors a user sees, each with the exit code of `clip-train`."""


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
