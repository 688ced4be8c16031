"""Are the libraries that are installed those that this package needs?"""

from __future__ import annotations

from clip_train.errors import UserError


def require_versions() -> None:
    """Check the versions of all installed libraries that this package names. Imports none of them.

    Raises:
        UserError: one is missing or another version; found and needed versions are listed.
    """
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("clip-train") or []]
    except PackageNotFoundError:
        return  # a bare checkout
    wrong = []
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing, needed {one.specifier}")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found}, needed {one.specifier}")
    if wrong:
        raise UserError(f"other libraries than clip-train needs: {'; '.join(wrong)}. `pip install -U clip-train` helps")
