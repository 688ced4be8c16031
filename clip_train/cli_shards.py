"""The commands of `clip-train shards`. Each imports what it needs itself, so that `--help` stays fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

CORES = os.cpu_count() or 1

ShardsArgument = Annotated[
    str, typer.Argument(help="Folder of .tar files, or a pattern such as 'data/{000..331}.tar'.")
]
Captions = Annotated[str, typer.Option(help="Members that hold captions: txt, json or txt+json.")]
IndexDir = Annotated[
    Path | None, typer.Option(help="Folder of the index, if it is not beside the shards. Also set data.index_dir.")
]
Jobs = Annotated[int, typer.Option(help="Processes.")]

shards = typer.Typer(help="Make and index shards of image-caption pairs.", no_args_is_help=True, rich_markup_mode=None)


@shards.command(name="make", epilog="clip-train shards make ~/pictures shards/mine --val 0.01 --jobs 8")
def shards_make(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures with a .txt each, of classes (--template) or of .tar shards; a .csv, .tsv, .jsonl "
            "or .parquet table; a .json of COCO captions."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder that gets train/ and val/.")],
    val: Annotated[
        float, typer.Option(help="Share of the pictures for validation, chosen by a hash of the picture.")
    ] = 0.0,
    image_col: Annotated[str | None, typer.Option(help="Column of a table with the path of the picture.")] = None,
    caption_col: Annotated[str | None, typer.Option(help="Column of a table with the caption.")] = None,
    sep: Annotated[str | None, typer.Option(help="Separator of a CSV file. Default: comma, in .tsv a tab.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder where the picture paths of a table or a COCO file start.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Caption of the pictures of a class, such as 'a photo of a {}'.")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(help="Shrink so that the short side has at most this many pixels.")
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of the pictures that were shrunk.")] = 90,
    shard_size: Annotated[int, typer.Option(help="Pairs in one shard.")] = 10_000,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the pairs. Without, they keep the order of the input.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    jobs: Jobs = CORES,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show five pairs and write nothing.")] = False,
) -> None:
    """Turn pictures and captions into shuffled, indexed WebDataset shards.

    A run that was killed continues when it is started again with the same arguments.
    """
    from clip_train.data.shards.inputs.pair import InputOptions
    from clip_train.data.shards.make import MakeOptions, make_shards
    from clip_train.data.shards.preview import preview_pairs

    options = MakeOptions(
        val=val, resize=resize, quality=quality, samples_per_shard=shard_size, shuffle=shuffle, seed=seed
    )
    input_options = InputOptions(
        image_col=image_col, caption_col=caption_col, sep=sep, images=images, template=template
    )
    if dry_run:
        print(preview_pairs(source, options=options, input_options=input_options))
    else:
        print(
            make_shards(source, out, options=options, input_options=input_options, jobs=jobs, progress=_show_progress)
        )


def _show_progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)


@shards.command(
    name="index", epilog="clip-train shards index shards/laion --filter 'similarity>=0.3' --filter LANGUAGE=en"
)
def shards_index(
    source: ShardsArgument,
    crc: Annotated[
        bool, typer.Option("--crc", help="Read every image and caption once and record its checksum.")
    ] = False,
    captions: Captions = "txt",
    conditions: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Keep samples with FIELD >=, <=, >, <, = or != VALUE, or 'FIELD in FILE'. FIELD is width, height, "
            "key or a field of the json member. Several must all hold.",
        ),
    ] = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="RUN/bad: leave out the samples which that run could not use.")
    ] = None,
    source_name: Annotated[
        str | None, typer.Option("--source", help="Which source of the run SOURCE was, if it had several.")
    ] = None,
    allow_truncated: Annotated[
        bool, typer.Option("--allow-truncated", help="Use the samples before the cut of a shard that is cut off.")
    ] = False,
    index_dir: IndexDir = None,
    jobs: Jobs = CORES,
) -> None:
    """Walk the headers of shards, check them and write the index that training reads.

    The index holds what this call keeps: without --filter and --quarantine all samples are back.
    """
    from clip_train.data.shards.index import index_source

    summary = index_source(
        source, captions=tuple(captions.split("+")), crc=crc, conditions=conditions or [], quarantine=quarantine,
        source=source_name, allow_truncated=allow_truncated, index_dir=index_dir, jobs=jobs,
    )  # fmt: skip
    print(summary)


@shards.command(name="scenes", epilog="clip-train shards scenes shards/demo")
def shards_scenes(
    out: Annotated[Path, typer.Argument(help="Folder that gets train/, val/ and classes/.")],
    train: Annotated[int, typer.Option(help="Training pairs.")] = 40_000,
    val: Annotated[int, typer.Option(help="Validation pairs.")] = 1_000,
    seed: Annotated[int, typer.Option(help="Seed of the drawings.")] = 0,
) -> None:
    """Draw compositional pictures with captions; 20 combinations of shape and colour are kept out of training."""
    from clip_train.data.scenes.write import write_scenes

    print(write_scenes(out, num_train=train, num_val=val, seed=seed))
