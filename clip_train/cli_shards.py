"""The commands of `clip-train shards`. Each imports what it needs itself, so that `--help` stays fast."""

from __future__ import annotations

import os
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


@shards.command(name="make", epilog="clip-train shards make ~/pictures shards/mine --val 0.01")
def shards_make(
    source: Annotated[Path, typer.Argument(help="Folder of pictures, each with a .txt of the same name beside it.")],
    out: Annotated[Path, typer.Argument(help="Folder that gets train/ and val/.")],
    val: Annotated[
        float, typer.Option(help="Share of the pictures for validation, chosen by a hash of the picture.")
    ] = 0.0,
    resize: Annotated[
        int | None, typer.Option(help="Shrink so that the short side has at most this many pixels.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Pairs in one shard.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
) -> None:
    """Turn a folder of pictures and captions into shuffled, indexed WebDataset shards."""
    from clip_train.data.shards.make import make_shards

    print(make_shards(source, out, val=val, resize=resize, samples_per_shard=samples_per_shard, seed=seed))


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
