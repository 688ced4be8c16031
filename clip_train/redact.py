"""What must never be written down: which names are those of secrets, and text without them."""

from __future__ import annotations

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
_PARAMETER = re.compile(r"(?P<start>[?&;])(?P<name>[\w.-]+)=(?P<value>[^&;#\s'\"]+)")


def has_login(text: str) -> bool:
    """Return whether a text holds a URL with user and password."""
    return _URL_LOGIN.search(text) is not None


def redact(text: str) -> str:
    """Return a text without logins in URLs and without the signatures, keys and tokens among their parameters."""
    text = _URL_LOGIN.sub(rf"\g<scheme>{_HIDDEN}@", text)
    return _PARAMETER.sub(_hide_secret, text)


def redact_tree(value: Any) -> Any:
    """Return lists and mappings with every text in them redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _hide_secret(found: re.Match[str]) -> str:
    name = found["name"].lower()
    is_secret = name in _SHORT_PARAMETERS or SECRET_NAME.search(name)
    return f"{found['start']}{found['name']}={_HIDDEN}" if is_secret else found[0]
