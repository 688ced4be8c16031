"""`clip-train classify`: pictures and labels from the command line, answers as a table or as JSON."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_train.data.images.folder import pictures_below
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.prompts.files import read_lines
from clip_train.tools.classify import AUTO, BACKGROUND, NONE, OFF, PictureScores, classify
from clip_train.tools.run import newest_run

if TYPE_CHECKING:
    from clip_train.interop.loaded_model import LoadedModel

STDIN = "-"
UNKNOWN = "unknown"


def classify_command(
    images: list[str],
    *,
    labels: str | None,
    labels_file: Path | None,
    model: str | None,
    templates: str = NONE,
    min_similarity: str = AUTO,
    top: int = 5,
    as_json: bool = False,
) -> int:
    """Classify pictures and print the answers; return the exit code, 3 if a picture could not be read.

    Args:
        images: pictures, folders of pictures, patterns, or `-` for paths on standard input, one per line.
        labels: separated by commas; or else
        labels_file: a text file with one label per line.
        model: anything that `clip_train.load` takes; None for the newest run below `runs`.
        templates: see `classify`.
        min_similarity: a number, `auto` or `off`, see `classify`.
        top: labels shown for each picture.
        as_json: print one JSON object per picture instead of a table.

    Raises:
        UserError: there is no label, no picture or no model, or an argument is out of range.
    """
    names = read_labels(labels, labels_file=labels_file)
    least = parse_min_similarity(min_similarity)
    if top < 1:
        raise UserError(f"--top={top} must be at least 1")
    paths = list(find_pictures(images))
    if not paths:
        raise UserError(f"no pictures in {', '.join(images)}")
    if len(names) == 1:
        print(
            "one label: its probability would always be 1, so it is compared with "
            + " and ".join(f"'{prompt}'" for prompt in BACKGROUND),
            file=sys.stderr,
        )
    import clip_train

    source = model if model is not None else str(newest_run())
    loaded, _ = clip_train.load(source)
    results = classify(paths, model=loaded, labels=names, templates=templates, min_similarity=least, top=top)
    if as_json:
        num_bad = print_json(results, model=source)
    else:
        num_bad = print_table(results)
        print(describe_model(loaded, source=source, min_similarity=least))
    return IntegrityError.exit_code if num_bad else 0


def read_labels(labels: str | None, *, labels_file: Path | None) -> list[str]:
    """Return distinct labels from a text with commas, or from the lines of a file.

    Raises:
        UserError: both or none are given, or there is no label.
    """
    if (labels is None) == (labels_file is None):
        raise UserError('give --labels "a,b,c" or --labels-file FILE, one of them')
    if labels is None:
        assert labels_file is not None
        return list(dict.fromkeys(read_lines(labels_file)))
    names = list(dict.fromkeys(label.strip() for label in labels.split(",") if label.strip()))
    if not names:
        raise UserError("--labels is empty: give texts separated by commas")
    return names


def parse_min_similarity(text: str) -> float | str:
    """Return `auto`, `off` or a cosine.

    Raises:
        UserError: it is none of these.
    """
    if text in (AUTO, OFF):
        return text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise UserError(f"--min-similarity={text} must be {AUTO}, {OFF} or a cosine in [-1, 1]")
    return value


def find_pictures(places: Iterable[str]) -> Iterator[Path]:
    """Yield files as they are, and the pictures below folders and of patterns in order of their paths.

    `-` stands for the lines of standard input. A pattern counts only where there is no file of its name.

    Raises:
        UserError: a place is no path.
    """
    for place in places:
        path = Path(place)
        if "\0" in place:
            raise UserError("standard input is not text: give it the paths of pictures, one per line")
        if "://" in place:
            raise UserError(f"{place} is a URL, and pictures are read from files: download it first")
        if place == STDIN:
            yield from find_pictures(line.strip() for line in sys.stdin if line.strip())
        elif path.is_dir():
            yield from sorted(pictures_below(path), key=os.fsencode)
        elif glob.has_magic(place) and not path.exists():
            yield from (Path(name) for name in sorted(glob.glob(place, recursive=True), key=os.fsencode))  # noqa: PTH207 absolute patterns
        else:
            yield path


def describe_model(model: LoadedModel, *, source: str, min_similarity: float | str) -> str:
    """Say in one line which model answered, and how far its answers are calibrated."""
    known = model.calibration
    parts = [source if known is None else known.model]
    measured = known and known.temperature
    by_itself = model.logit_bias is not None
    if measured and by_itself == (measured.bias is not None):
        bias = "" if measured.bias is None else f" and bias {measured.bias:.3g}, each label by itself"
        parts.append(f"calibrated at temperature {measured.value:.3g}{bias}")
    else:
        parts.append("probabilities not calibrated")
    if min_similarity == AUTO and not (known and known.rejection) and not (measured and measured.bias is not None):
        parts.append(
            f"always an answer, since no threshold was measured (clip-train evaluate checkpoint={source} "
            "evaluation=[reject] evaluation.reject.root=DIR)"
        )
    return "; ".join(parts)


def print_json(results: Iterable[PictureScores], *, model: str) -> int:
    """Print one JSON object per picture and return the number of unreadable ones."""
    num_bad = 0
    for result in results:
        row: dict[str, object] = {"path": result.picture, "model": model}
        if result.error is None:
            row["answer"] = result.answer or UNKNOWN
            row["unknown"] = result.unknown and {
                "score": result.unknown.threshold.score,
                "value": result.unknown.value,
                "threshold": result.unknown.threshold.value,
                "nearest": result.unknown.nearest,
                "reason": result.unknown.reason,
            }
            row["labels"] = [score._asdict() for score in result.scores]
        else:
            row["error"] = result.error
            num_bad += 1
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return num_bad


def print_table(results: Iterable[PictureScores]) -> int:
    """Print a table of labels per picture, unreadable pictures on standard error, and return how many those are."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("picture", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("cosine", justify="right", no_wrap=True)
    num_bad = 0
    reasons: dict[str, None] = {}
    for result in results:
        if result.error is not None:
            print(f"{result.picture}: {result.error}", file=sys.stderr)
            num_bad += 1
        if result.unknown:
            table.add_row(Text(result.picture), Text(f"{UNKNOWN} (none of the labels)", style="bold yellow"))
            reasons.setdefault(f"unknown: below {result.unknown.threshold}; {result.unknown.threshold.origin}")
        for i, score in enumerate(result.scores):
            is_answer = i == 0 and not result.unknown
            style = "bold" if is_answer else ""
            table.add_row(
                Text(result.picture if is_answer else ""),
                Text(score.label, style=style),
                Text(f"{100 * score.probability:.1f} %", style=style),
                f"{score.cosine:.3f}",
                end_section=score is result.scores[-1],
            )
    if table.row_count:
        Console().print(table)
    for reason in reasons:
        print(reason)
    return num_bad
