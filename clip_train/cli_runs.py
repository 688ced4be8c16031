"""The commands about runs on disk: `clip-train runs` and `clip-train compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

runs = typer.Typer(help="List, show and delete runs.", no_args_is_help=True, rich_markup_mode=None)

RunArgument = Annotated[Path, typer.Argument(help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@runs.command(name="ls")
def runs_ls(
    folder: Annotated[Path, typer.Argument(help="Where to look, with all folders below.")] = Path("runs"),
    where: Annotated[
        str | None,
        typer.Option(help="Condition on config keys, newest metrics, status, step and size_gib: ==, <, in, and, or."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: status, step, time left, best score, size, and the step at which they continue."""
    from clip_train.tools.runs.command import list_runs

    raise typer.Exit(list_runs(folder, where=where, as_json=as_json))


@runs.command(name="show")
def runs_show(run: RunArgument) -> None:
    """Show one run: how it stands, what it was trained with, its attempts, checkpoints and newest scores."""
    from clip_train.tools.runs.command import show_run

    show_run(run)


@runs.command(name="rm")
def runs_rm(
    folders: Annotated[list[Path], typer.Argument(help="Run directories.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete runs with all their checkpoints, after asking. A live run is never deleted."""
    from clip_train.tools.runs.command import remove_runs

    raise typer.Exit(remove_runs(folders, yes=yes))


def compare(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="FIRST SECOND...",
            help="Runs, checkpoints of runs or folders of results; the first is what the others are compared with. "
            "Several seeds of one recipe with commas between.",
        ),
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="imagenet/acc1, acc1 or imagenet; repeat for several. All if not given.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with curves, to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether one model is better than another: differences with paired 95 % intervals over the same items."""
    from clip_train.tools.compare.command import compare_command

    compare_command(given, metrics=metric or [], html=html, as_json=as_json)
