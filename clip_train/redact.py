"""What must never be written down: which names are those of secrets, and text without them."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

SECRET_NAME = re.compile(
    r"password|passwd|secret|credential|signature|(api|access|private|account|auth)[_-]?key"
    r"|(access|auth|api|hf|security|session)[_-]?token",
    re.IGNORECASE,
)
_SHORT_PARAMETERS = ("key", "token", "sig")
_HIDDEN = "REDACTED"
_URL_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s'\"@]*:[^/\s'\"@]*@", re.IGNORECASE)
_PARAMETER = re.compile(r"(?P<start>[?&;])(?P<name>[\w.-]+)=(?P<value>[^&;#\s'\"]*[^&;#\s'\":,.)])")
_ASSIGNMENT = re.compile(  # `api_key=…` in a command, `"api_key": "…"` in an answer
    rf"(?P<start>\b[\w.-]*(?:{SECRET_NAME.pattern})[\w.-]*(?:=|['\"]\s*:\s*)['\"]?)(?P<value>[^\s'\",;&]+)",
    re.IGNORECASE,
)
_LOGIN_HEADER = re.compile(r"(?P<start>\bBearer\s+|\bAuthorization['\"]?\s*[:=]\s*['\"]?\w+\s+)[\w.~+/=-]{8,}", re.I)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY_ID)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; shorter values are words that appear everywhere


class RedactingFormatter(logging.Formatter):
    """Formats log records without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted text of a record."""
        return redact(super().format(record))


def has_login(text: str) -> bool:
    """Return whether a text holds a URL with user and password."""
    return _URL_LOGIN.search(text) is not None


def redact(text: str) -> str:
    """Return a text without secrets.

    That is: without logins in URLs, the signatures, keys and tokens among their parameters, values that are assigned to
    names of secrets, and the values of this process's environment variables whose names are those of secrets.
    """
    text = unsigned(text)
    text = _ASSIGNMENT.sub(rf"\g<start>{_HIDDEN}", text)
    text = _LOGIN_HEADER.sub(rf"\g<start>{_HIDDEN}", text)
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, _HIDDEN)
    return text


def unsigned(url: str) -> str:
    """Return a URL, or a text with some, without its login and signature: what stays when these are renewed."""
    if "@" in url:  # asked for the name of every shard, of which there may be 200,000
        url = _URL_LOGIN.sub(rf"\g<scheme>{_HIDDEN}@", url)
    return _PARAMETER.sub(_hide_secret, url) if "=" in url else url


def redact_tree(value: Any) -> Any:
    """Return lists and mappings with every text in them redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _secrets_of_the_environment() -> list[str]:
    """Return the values to hide, longest first, as one may be a part of another. Paths to key files are none."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((v for v in values if len(v) >= _SHORTEST_SECRET and not v.startswith("/")), key=len, reverse=True)


def _hide_secret(found: re.Match[str]) -> str:
    name = found["name"].lower()
    is_secret = name in _SHORT_PARAMETERS or SECRET_NAME.search(name)
    return f"{found['start']}{found['name']}={_HIDDEN}" if is_secret else found[0]
