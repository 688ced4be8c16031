"""`clip-train search`: a text or a picture from the command line, the nearest pictures as a table, JSON or a page."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_train.data.images.decode import open_image, to_rgb
from clip_train.errors import IntegrityError, UserError
from clip_train.tools.pages import page_templates, write_page
from clip_train.tools.report_pictures import data_uri
from clip_train.tools.run import newest_run
from clip_train.tools.search import embed_query, nearest, update_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.tools.search import ImageIndex, Match

_SHOWN_SIDE = 320  # pixels of a picture's longer side on the page


def search_command(
    query: str,
    folder: Path,
    *,
    model: str | None,
    top: int = 20,
    html: Path | None = None,
    as_json: bool = False,
    index_dir: Path | None = None,
) -> int:
    """Print the pictures of a folder that are nearest to the query; return the exit code, 3 if one could not be read.

    Args:
        query: a text, or a file that is a picture.
        folder: of pictures.
        model: anything that `clip_train.load` takes; None for the newest run below `runs`.
        top: pictures shown.
        html: also write a page with the pictures.
        as_json: print one JSON object per picture instead of a table.
        index_dir: see `update_index`.

    Raises:
        UserError: there is no picture, no model or no folder, or a file cannot be written.
    """
    if top < 1:
        raise UserError(f"--top={top} must be at least 1")
    import clip_train

    source = model if model is not None else str(newest_run())
    loaded, _ = clip_train.load(source)
    vector = embed_query(query, model=loaded)
    index = update_index(folder, model=loaded, index_dir=index_dir)
    for name, reason in index.unreadable.items():
        print(f"{folder / name}: {reason}", file=sys.stderr)
    if not index.files:
        raise UserError(f"no pictures that can be read in {folder}")
    matches = nearest(index, vector, top=top)
    if as_json:
        for rank, match in enumerate(matches, start=1):
            row = {"query": query, "rank": rank, "path": str(folder / match.image_path), "cosine": match.cosine}
            print(json.dumps(row, ensure_ascii=False))
    else:
        _print_table(matches, folder=folder)
        print(_summary(index, source=source))
    if html is not None:
        print(
            f"wrote {_write_gallery(html, query=query, matches=matches, folder=folder, index=index)}", file=sys.stderr
        )
    return IntegrityError.exit_code if index.unreadable else 0


def _print_table(matches: Sequence[Match], *, folder: Path) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("cosine", justify="right", no_wrap=True)
    table.add_column("picture", overflow="fold")
    for match in matches:
        table.add_row(f"{match.cosine:.3f}", Text(str(folder / match.image_path)))
    Console().print(table)


def _summary(index: ImageIndex, *, source: str) -> str:
    return f"{source}; {len(index.files):,} pictures, {index.num_embedded:,} of them embedded now; index {index.place}"


def _write_gallery(
    path: Path, *, query: str, matches: Sequence[Match], folder: Path, index: ImageIndex
) -> Path:  # fmt: skip
    shown = []
    for match in matches:
        image = to_rgb(open_image((folder / match.image_path).read_bytes()))
        image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        shown.append(
            {"picture": data_uri(np.asarray(image)), "path": _readable(match.image_path), "cosine": match.cosine}
        )
    page = page_templates().get_template("search.html.j2").render(
        query=query, matches=shown, folder=_readable(str(folder)), num_pictures=len(index.files)
    )  # fmt: skip
    return write_page(path, page)


def _readable(path: str) -> str:
    """Return a path as text; file names need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
