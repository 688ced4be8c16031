"""What the command line says as KEY=VALUE: make it readable for Hydra, and refuse code and secrets in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.redact import SECRET_NAME, has_login

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser

_BRACKETS = {"[": "]", "{": "}"}
_TARGET = "_target_"


def readable(overrides: list[str]) -> list[str]:
    """Return overrides as Hydra's grammar takes them: a value that it cannot read is quoted, so that it is plain text.

    The grammar knows no `~`, `#`, `=`, `(` or letters beyond ASCII outside quotes, and braces only as a mapping; paths,
    URLs and brace patterns hold them all.

    Raises:
        UserError: there is no key, or the value is a list, a mapping or a quoted text that does not end well.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_readable(override, parser=parser) for override in overrides]


def refuse_code_and_secrets(key: str, value: str) -> None:
    """Check that a key and its value may be saved with the run.

    Raises:
        UserError: they name code to run, the key is that of a secret, or the value is a URL with a password.
    """
    if _TARGET in key or _TARGET in value:
        raise UserError(f"{key}: a config holds values, never code ({_TARGET})")
    if any(SECRET_NAME.search(part) for part in key.split(".")):
        raise UserError(f"{key}: keys and passwords come from the environment or a login, never from the config")
    if has_login(value):
        raise UserError(f"{key}: a URL with a password would be saved with the run; put the password into ~/.netrc")


def _readable(override: str, *, parser: OverridesParser) -> str:
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    if not key.lstrip("+~") or not (equals or key.startswith("~")):
        raise UserError(f"{override!r} is no KEY=VALUE: `clip-train train --help` lists the keys")
    try:
        parser.parse_override(override)
        return override
    except HydraException as error:
        if value[:1] in ("'", '"') or (value and _BRACKETS.get(value[0]) == value[-1]):
            raise UserError(f"{override}: {str(error).splitlines()[0]}") from error
    # In quotes a backslash stands for itself, but before a quote and at the end.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"{key}='{escaped}'"
