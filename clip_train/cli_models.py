"""The commands that use a trained model: classify, search, prompts and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def classify(
    images: Annotated[list[str], typer.Argument(help="Pictures, folders, patterns, or - for paths on standard input.")],
    labels: Annotated[str | None, typer.Option(help="Labels, separated by commas.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="Text file with one label per line.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A run directory or anything that clip_train.load takes; the newest run.")
    ] = None,
    templates: Annotated[
        str,
        typer.Option(help="none: labels are whole captions; single, simple, imagenet, a file or 'a {}' put them in."),
    ] = "none",
    min_similarity: Annotated[
        str, typer.Option(help="Cosine below which the answer is unknown; auto: as measured with the model; off.")
    ] = "auto",
    top: Annotated[int, typer.Option(help="Labels shown for each picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a picture.")] = False,
) -> None:
    """Say which label fits each picture: probability, raw cosine, or unknown and why."""
    from clip_train.tools.classify_command import classify_command

    code = classify_command(
        images, labels=labels, labels_file=labels_file, model=model, templates=templates,
        min_similarity=min_similarity, top=top, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(code)


def search(
    query: Annotated[str, typer.Argument(help="A text, or a file that is a picture.")],
    folder: Annotated[Path, typer.Argument(help="Pictures, in subfolders too; their index is kept and grows.")],
    model: Annotated[
        str | None, typer.Option(help="A run directory or anything that clip_train.load takes; the newest run.")
    ] = None,
    top: Annotated[int, typer.Option(help="Pictures shown.")] = 20,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a picture.")] = False,
    index: Annotated[Path | None, typer.Option(help="Where indexes are kept; DIR/.clip-train-index.")] = None,
) -> None:
    """Find the pictures of a folder that are nearest to a text or to another picture."""
    from clip_train.tools.search_command import search_command

    code = search_command(query, folder, model=model, top=top, html=html, as_json=as_json, index_dir=index)
    raise typer.Exit(code)


def prompts(
    model: Annotated[str, typer.Argument(help="A run directory or anything that clip_train.load takes.")],
    images: Annotated[Path, typer.Argument(help="A labelled set, as evaluation.classify.root.")],
    split: Annotated[str, typer.Option(help="Part of the set.")] = "test",
    templates: Annotated[str, typer.Option(help="Candidates: imagenet, simple, single or a file.")] = "imagenet",
    classnames: Annotated[str, typer.Option(help="As evaluation.classify.classnames.")] = "auto",
    most: Annotated[int, typer.Option(help="Templates to choose, at most.")] = 8,
    name: Annotated[
        str | None, typer.Option(help="Name of the file in RUN/prompts/; the set's own if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write, instead of one in the run.")] = None,
) -> None:
    """Choose prompt templates on half of a labelled set and say what they gain on the other half."""
    from clip_train.tools.prompts import prompts_command

    lines = prompts_command(
        model, images, split=split, templates=templates, classnames=classnames, most=most, name=name, out=out
    )
    print("\n".join(lines))


def export(
    source: Annotated[str, typer.Argument(help="A run directory or anything that clip_train.load takes.")],
    to: Annotated[
        str,
        typer.Option(
            help="folder (open_clip, transformers, sentence-transformers), clip (OpenAI's archive), onnx, or all."
        ),
    ] = "all",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; RUN/export or exports/NAME if not given.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Of a run: ema, raw, best, or auto, the average if there is one.")
    ] = "auto",
    drop_logit_bias: Annotated[
        bool, typer.Option("--drop-logit-bias", help="Leave the bias out where there is none: other probabilities.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write 8-bit ONNX graphs: close, not equal.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare features with every library that is installed.")
    ] = False,
    verify_python: Annotated[
        list[Path] | None,
        typer.Option(help="A Python that has more of the libraries; repeat for several. Implies --verify."),
    ] = None,
    push: Annotated[str | None, typer.Option(help="ORG/NAME on the hub to upload to.")] = None,
) -> None:
    """Write a model as other libraries read it, with a model card, and prove that they compute the same."""
    from clip_train.tools.export import export_command

    code = export_command(
        source, to=to, out=out, weights=weights, drop_logit_bias=drop_logit_bias, int8=int8,
        prove=verify, pythons=verify_python or [], repository=push,
    )  # fmt: skip
    raise typer.Exit(code)
