"""A picture and its captions, by where they lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from clip_train.data.images.decode import BadSampleError
from clip_train.errors import UserError
from clip_train.storage.remote import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable


class Stored(Protocol):
    """Bytes that lie somewhere. A value: equal places are equal."""

    @property
    def path(self) -> Path:
        """Return the file that holds them."""

    def read(self) -> bytes | None:
        """Return the bytes; None if they are not there.

        Raises:
            BadSampleError: they cannot be read.
        """


class Content(NamedTuple):
    """Bytes of a file, or of a piece of it."""

    path: Path
    offset: int = 0
    length: int | None = None  # None: to the end

    def read(self) -> bytes | None:
        """Return the bytes; None if there is no such file.

        Raises:
            BadSampleError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.length)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            raise BadSampleError("unreadable") from error


class Absent(NamedTuple):
    """What a caption belongs to and is not there."""

    path: Path  # of what names it

    def read(self) -> None:
        """Return None."""


class Pair(NamedTuple):
    """A picture with its captions, none of them read yet."""

    name: str  # unique in the input: decides the shuffle and names the sample
    image: Stored
    captions: Content | tuple[str | None, ...]  # a text file, or the captions themselves; None is one that is no text
    extras: tuple[tuple[str, Content | bytes], ...] = ()  # further members by extension, where they exist


class Row(NamedTuple):
    """A row of a table."""

    picture: str | None  # its path; None if the row names none
    captions: list[str | None]
    name: str = ""  # what to call a row without a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The pairs of an input and what kind of input it is."""

    kind: str
    pairs: list[Pair]
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that are neither pictures nor captions by their names, by extension."""

    def __str__(self) -> str:
        ignored = ", ".join(f"{count:,} {extension}" for extension, count in self.ignored.most_common())
        return f"{self.kind} (not read: {ignored})" if ignored else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """How an input is to be read; None leaves the choice to its reader."""

    image_col: str | None = None
    """Column of tables that names the picture."""
    caption_col: str | None = None
    """Column of tables that holds the caption."""
    sep: str | None = None
    """What separates the columns of a CSV file."""
    images: Path | None = None
    """Folder from which the picture paths of tables and COCO files start."""
    template: str | None = None
    """Caption of the pictures of a class, with {} for the name of the class' folder."""
    keep_repeats: bool = False
    """Keep a caption that one picture has several times: an evaluation counts every caption, training wants it once."""

    def refuse_except(self, *used: str, kind: str) -> None:
        """Check that only options which mean something for a kind of input are set.

        Raises:
            UserError: another one is set.
        """
        for name in ("image_col", "caption_col", "sep", "images", "template"):
            if name not in used and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} means nothing for {kind}")


def pairs_of_rows(rows: Iterable[Row], *, images: Path, keep_repeats: bool = False) -> list[Pair]:
    """Return one pair per picture of rows, in order of first appearance, then those without one, which cannot be used.

    A picture that several rows name gets the captions of all of them, each different one once unless `keep_repeats`.

    Raises:
        UserError: a picture is given by its URL.
    """
    by_image: dict[str, list[str | None]] = {}
    without: list[Pair] = []
    for row in rows:
        if row.picture is None:
            without.append(Pair(row.name, Absent(images), tuple(row.captions)))
        else:
            by_image.setdefault(row.picture, []).extend(row.captions)
    elsewhere = next(filter(is_remote, by_image), None)
    if elsewhere is not None:
        raise UserError(f"{elsewhere} is not a file here: fetch the pictures first, for example with img2dataset")
    pairs = [
        Pair(image, Content(images / image), tuple(captions if keep_repeats else dict.fromkeys(captions)))
        for image, captions in by_image.items()
    ]
    return pairs + without
