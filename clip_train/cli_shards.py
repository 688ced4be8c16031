"""The commands of `clip-train shards`. Each imports what it needs itself, so that `--help` stays fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clip_train.data.shards.layouts import Layout
from clip_train.errors import IntegrityError, UserError

CORES = os.cpu_count() or 1

ShardsArgument = Annotated[
    str,
    typer.Argument(help="Folder of .tar files, or a pattern such as 'data/{000..331}.tar'; also s3://, https:// …"),
]
Captions = Annotated[str, typer.Option(help="Members that hold captions: txt, json or txt+json.")]
CaptionField = Annotated[str, typer.Option(help="Where captions are, as data.caption: txt or json:FIELD.")]
IndexDir = Annotated[
    Path | None, typer.Option(help="Folder of the index, if it is not beside the shards. Also set data.index_dir.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where remote shards lie while they are read. Default: that of data.cache.dir."),
]
Jobs = Annotated[int, typer.Option(help="Processes.")]

shards = typer.Typer(
    help="Make, index, check and show shards of image-caption pairs.", no_args_is_help=True, rich_markup_mode=None
)


@shards.command(name="make")
def shards_make(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures with a .txt each, of classes (--template) or of .tar shards; a .csv, .tsv, .jsonl "
            "or .parquet table, or a folder of .parquet files; a .json of COCO captions."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder that gets train/ and val/.")],
    val: Annotated[
        float, typer.Option(help="Share of the pictures for validation, chosen by a hash of the picture.")
    ] = 0.0,
    image_col: Annotated[str | None, typer.Option(help="Column of a table with the picture or its path.")] = None,
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")] = 0,
    jobs: Jobs = CORES,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show five pairs and write nothing.")] = False,
    layout: Annotated[
        Layout, typer.Option(help="train; or eval: a set in clip-benchmark's layout, in the input's order.")
    ] = Layout.train,
    split: Annotated[str, typer.Option(help="Of --layout eval: which part is read and written.")] = "test",
    classnames: Annotated[str, typer.Option(help="Of --layout eval, as evaluation.NAME.classnames.")] = "auto",
    templates: Annotated[str, typer.Option(help="Of --layout eval, as evaluation.NAME.templates.")] = "auto",
) -> None:
    """Turn pictures and captions into shuffled, indexed WebDataset shards.

    A run that was killed continues when it is started again with the same arguments.
    """
    if layout is Layout.eval:
        for option, given in (
            ("--val", val), ("--image-col", image_col), ("--caption-col", caption_col), ("--sep", sep),
            ("--template", template), ("--resize", resize), ("--dry-run", dry_run), ("--no-shuffle", not shuffle),
        ):  # fmt: skip
            if given:
                raise UserError(f"{option} means nothing for --layout eval, which keeps pictures and order as they are")
        from clip_train.tools.evaluation_set import make_evaluation_set

        print(
            make_evaluation_set(
                source, out, split=split, images=images, classnames=classnames, templates=templates,
                samples_per_shard=shard_size,
            )
        )  # fmt: skip
        return
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


@shards.command(name="index")
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
    cache_dir: CacheDir = None,
    jobs: Jobs = CORES,
) -> None:
    """Walk the headers of shards, check them and write the index that training reads.

    The index holds what this call keeps: without --filter and --quarantine all samples are back.
    """
    from clip_train.data.shards.index import index_source

    summary = index_source(
        source, captions=tuple(captions.split("+")), crc=crc, conditions=conditions or [], quarantine=quarantine,
        source=source_name, allow_truncated=allow_truncated, index_dir=index_dir, jobs=jobs,
        cache_dir=cache_dir,
    )  # fmt: skip
    print(summary)


@shards.command(name="check")
def shards_check(
    source: ShardsArgument,
    batch_size: Annotated[int, typer.Option(help="Global batch size, for the duplicates to expect in a batch.")] = 4096,
    world: Annotated[int, typer.Option(help="Ranks of the run to come.")] = 1,
    workers: Annotated[int, typer.Option(help="Loader processes of each rank.")] = 2,
    caption: CaptionField = "txt",
    index_dir: IndexDir = None,
    cache_dir: CacheDir = None,
    jobs: Jobs = CORES,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, every defect too, as JSON.")] = False,
) -> None:
    """Read every sample as a run would, and name every defect with shard and key.

    Exit code 3 if a run would stop: a shard is damaged, or over 1 % of the samples cannot be used.
    """
    from clip_train.data.shards import check_text
    from clip_train.data.shards.check import check_source
    from clip_train.tokenizer.bpe import ClipTokenizer

    report = check_source(
        source, tokenizer=ClipTokenizer(), batch_size=batch_size, world=world, workers=workers, caption=caption,
        index_dir=index_dir, jobs=jobs, cache_dir=cache_dir,
    )  # fmt: skip
    print(check_text.as_json(report) if as_json else check_text.as_text(report))
    if report.would_stop:
        raise typer.Exit(IntegrityError.exit_code)


@shards.command(name="overlap")
def shards_overlap(
    source: ShardsArgument,
    sets: Annotated[list[Path], typer.Argument(help="Evaluation sets: folders of pictures or of .tar files.")],
    distance: Annotated[int, typer.Option(help="Bits of the 64-bit perceptual hashes that may differ.")] = 8,
    likeness: Annotated[float, typer.Option(help="Least correlation of the thumbnails.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="CSV file to write, one line per picture that was found.")] = None,
    cache_dir: CacheDir = None,
    jobs: Jobs = CORES,
) -> None:
    """Say which pictures of evaluation sets are among the training pictures, resized, re-encoded or mirrored too."""
    from clip_train.data.shards.overlap import find_overlap, write_matches

    found = find_overlap(source, sets, max_distance=distance, min_likeness=likeness, jobs=jobs, cache_dir=cache_dir)
    print("\n".join(overlap.line() for overlap in found))
    if out is not None:
        write_matches(found, out)


@shards.command(name="show")
def shards_show(
    source: ShardsArgument,
    out: Annotated[Path, typer.Argument(help="The page to write, such as sheet.html.")],
    number: Annotated[int, typer.Option("--num", help="Samples shown.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and the crops, as of a run.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of the model's pictures in pixels.")] = 224,
    caption: CaptionField = "txt",
    index_dir: IndexDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write a page of samples: pictures as stored and as the trainer sees them, captions read back from token ids."""
    from clip_train.tools.contact_sheet import write_contact_sheet

    print(
        write_contact_sheet(
            source,
            out,
            number=number,
            seed=seed,
            image_size=image_size,
            caption=caption,
            index_dir=index_dir,
            cache_dir=cache_dir,
        )
    )


@shards.command(name="scenes")
def shards_scenes(
    out: Annotated[Path, typer.Argument(help="Folder that gets train/, val/ and classes/.")],
    train: Annotated[int, typer.Option(help="Training pairs.")] = 40_000,
    val: Annotated[int, typer.Option(help="Validation pairs.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawings.")] = 0,
) -> None:
    """Draw compositional pictures with captions; 20 combinations of shape and colour are kept out of training."""
    from clip_train.data.scenes.write import write_scenes

    print(write_scenes(out, num_train=train, num_val=val, seed=seed, workers=CORES))


@shards.command(name="replay")
def shards_replay(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    step: Annotated[int, typer.Option(help="Step of the run, counted from 1.")],
    images: Annotated[Path | None, typer.Option(help="Folder that gets the pictures as the model saw them.")] = None,
) -> None:
    """Print the very batch of a step and compare it with what training noted. Needs no GPU."""
    from clip_train.tools.replay import replay

    print(replay(run, step=step, images=images))
