"""Fetch Debian's public-domain drawings and write them with captions as shards.

    python scripts/fetch_clipart.py shards/clipart

Needs Debian (or a relative of it) with apt, but no root: the package lists and the package go to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from debian import fetch_package
from PIL import Image, ImageOps

from clip_train.data.index.jobs import run_jobs
from clip_train.data.shards.make import MakeOptions, make_shards
from clip_train.errors import UserError

PACKAGE = "openclipart-png"
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MAX_ASPECT = 20
HELD_OUT = 0.1  # share of the drawings kept for evaluation
SIDE = 128  # of the written pictures, in pixels
MAX_SERIES = 20  # numbered variants of one drawing that are kept
STEM_LENGTH = 24  # the package cuts longer names here, then adds a number: an author's name may be incomplete

# Names end in their author's: words that say nothing about the picture. Only authors of several drawings are listed.
AUTHORS = (
    "aj ashton", "andy fitzsimon", "ani ani", "anthony liekens", "anton yu", "architetto francesco rollandin",
    "benji park", "brice boyer", "cedric bosdonnat", "charles mccolm", "christoph brill", "costea bogdan",
    "dan gerhards", "daniel steele", "dave pena", "dennis boyer", "dirk struve", "enrique meza c", "etienne bersac",
    "fco andrade", "francesco rollandin", "frederic moser", "frouke", "fudriot omic ch", "ganson", "gerald ganson",
    "gerald g", "guillaume boitel", "jarno vasamaa", "jean victor balin", "joel montes de oca", "jon phillips",
    "jonadab", "jonathan dietrich", "juliane krug", "kilian valkhof", "kurt cagle", "leif lodahl", "linda kim",
    "lumen design studios", "marcelo staudt", "mateya", "matt todd", "matthew gates", "mauro olivo",
    "michael breuer", "mimooh", "mo", "nathan eady", "nicolas clemente", "nicu buculei", "patricia fidi", "peterm",
    "rollandin francesco", "roman bertle", "romus", "rory mccann", "ruairi hann", "saurabh nanda",
    "sergio luiz araujo", "stefan bazelkov", "susan park", "tanguy jacq", "toh yen cheng", "utrescu",
    "valessio soares de brito", "victor balin", "yves guillou",
)  # fmt: skip


class Drawing(NamedTuple):
    """A picture of the package and its caption."""

    path: Path
    caption: str


def main() -> int:
    """Fetch, caption and shard the drawings; print how many were left out and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that gets train/ and val/; must not exist yet")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that resize")
    arguments = parser.parse_args()
    try:
        if arguments.out.exists():
            raise UserError(f"{arguments.out} exists already: remove it or name another folder")
        with tempfile.TemporaryDirectory(prefix="clipart-") as folder:
            root = fetch_package(PACKAGE, folder=Path(folder)) / "usr/share/openclipart/png"
            drawings = Path(folder) / "drawings"
            print_summary(write_drawings(root, out=drawings, workers=arguments.workers))
            # Split by the pictures' bytes: equal drawings under two names stay on one side.
            shards = make_shards(drawings, arguments.out, options=MakeOptions(val=HELD_OUT))
    except UserError as error:
        print(f"fetch_clipart: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{shards.train} drawings for training and {shards.val} held out in {arguments.out}")
    return 0


def write_drawings(root: Path, *, out: Path, workers: int) -> Counter[str]:
    """Write every usable picture under `root`, resized over white, and count all by what became of them."""
    drawings, skipped = choose(root)
    jobs = [(drawing, out / drawing.path.relative_to(root)) for drawing in drawings]
    skipped.update(run_jobs(_write, jobs, jobs=workers, chunk=16))
    return skipped


def choose(root: Path) -> tuple[list[Drawing], Counter[str]]:
    """List the drawings below `root` with their captions, and count the files left out by reason."""
    drawings: list[Drawing] = []
    skipped: Counter[str] = Counter()
    series: Counter[str] = Counter()
    for path in sorted(root.rglob("*.png")):
        caption = caption_of(path.relative_to(root))
        if path.is_symlink():
            skipped["other name of the same file"] += 1
        elif caption is None:
            skipped["name without words"] += 1
        elif series[caption] >= MAX_SERIES:
            skipped[f"numbered variant beyond the first {MAX_SERIES}"] += 1
        else:
            series[caption] += 1
            drawings.append(Drawing(path, caption))
    return drawings, skipped


def caption_of(path: Path) -> str | None:
    """Write a caption from a path like `animals/birds/swan_nicu_buculei_01.png`: `a drawing of a swan, birds, animals`.

    Returns None if no word is left without numbers and author.
    """
    numbered = re.fullmatch(r"(.*)_(?:\d\d[a-z]?|r|s|ac)?", path.stem)  # the ending of most names with an author
    stem = numbered[1] if numbered else path.stem
    words = _without_author(_words(stem), cut_off=numbered is not None and len(stem) >= STEM_LENGTH - 1)
    if not any(len(word) > 1 for word in words):
        return None
    parts = [part for part in reversed(path.parts[:-1]) if part not in ("unsorted", "duplicates", "special")]
    categories = [" ".join(_words(part)) for part in parts]
    name = " ".join(words)
    article = "an " if name[0] in "aeiou" else "a "
    if name.endswith("s") or {"flags", "geography"} & set(parts):
        article = ""
    return ", ".join([f"a drawing of {article}{name}", *categories])


def _words(name: str) -> list[str]:
    """Split a name at punctuation and CamelCase, and drop the numbers of variants: `star_51pt`, `home7`, `tree_03`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    spaced = re.sub(r"(?<=[^\W\d_]{2})\d+|\b\d+(?=[^\W\d]{2})|\d{2,}", " ", spaced.replace("_", " "))
    return [word for word in re.split(r"\W+", spaced) if word]


def _without_author(words: list[str], *, cut_off: bool) -> list[str]:
    """Drop a trailing author's name; of a cut-off file name also the beginning of one."""
    for start in range(1, len(words)):
        tail = " ".join(words[start:])
        if any(tail == author or (cut_off and author.startswith(tail)) for author in AUTHORS):
            return words[:start]
    return words


def _write(job: tuple[Drawing, Path]) -> str:
    """Write one picture and its caption; return what became of it."""
    (source, caption), target = job
    Image.MAX_IMAGE_PIXELS = None  # the limit below is ours, and is checked before any pixel is read
    try:
        with Image.open(source, formats=("PNG",)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return f"over {MAX_PIXELS // 10**6} megapixels"
            if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
                return f"narrower than {MIN_SIDE} pixels or {MAX_ASPECT}:1"
            picture = _over_white(image)
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged PNGs
        return "undecodable"
    # A white square around the whole drawing: the centre crop of the readers would cut a long one.
    picture = ImageOps.pad(picture, (SIDE, SIDE), Image.Resampling.BICUBIC, color="white")
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    target.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return "written"


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def print_summary(counts: Counter[str]) -> None:
    """Print how many pictures were found, and how many are left out for which reason."""
    print(f"{sum(counts.values())} files found, {counts['written']} drawings used")
    for reason, count in counts.most_common():
        if reason != "written":
            print(f"  {count:5d} left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
