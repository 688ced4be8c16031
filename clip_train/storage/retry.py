"""Try again where transport fails. Content is never judged here, and nothing is ever skipped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from clip_train.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

RETRIES = 5
_Result = TypeVar("_Result")


class TransportError(Exception):
    """Bytes did not arrive, or not all of them, or not the right ones; another attempt may bring them."""


def retry(
    attempt: Callable[[], _Result], *, first_wait: float, on_retry: Callable[[], object] | None = None
) -> _Result:
    """Return what `attempt` returns, trying up to 5 more times while it raises `TransportError`.

    Args:
        attempt: what to do; its other errors pass through.
        first_wait: seconds before the second attempt; each later wait is twice as long.
        on_retry: told before each wait.

    Raises:
        IntegrityError: the last attempt failed too; the message is its own.
    """
    for wait in (first_wait * 2**i for i in range(RETRIES)):
        try:
            return attempt()
        except TransportError:
            if on_retry is not None:
                on_retry()
            time.sleep(wait)
    try:
        return attempt()
    except TransportError as error:
        raise IntegrityError(f"{error} ({RETRIES + 1} attempts)") from error
