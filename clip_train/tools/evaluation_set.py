"""Write any evaluation set that we read in clip-benchmark's layout, so that both tools evaluate the same one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.data.index.tar import read_samples
from clip_train.data.shards.benchmark import Kind, LabelledPicture, has_layout, kind_of, multi_hot, write_layout
from clip_train.data.shards.inputs.table import read_csv
from clip_train.data.source import expand_shards
from clip_train.errors import UserError, reading
from clip_train.evaluation.classify.labelled_images import LabelledImages, open_labelled_images
from clip_train.evaluation.classify.table import LABEL_COLUMNS
from clip_train.evaluation.classify.table import TABLE_SUFFIXES as LABEL_TABLES
from clip_train.evaluation.retrieve.annotations import open_annotations
from clip_train.evaluation.retrieve.captioned_images import CaptionedImages, open_captioned_shards

if TYPE_CHECKING:
    from clip_train.data.sequential import ImageSource


def make_evaluation_set(
    source: Path, out: Path, *, split: str, images: Path | None, classnames: str, templates: str, samples_per_shard: int
) -> str:
    """Write the set of `source` into `out` in clip-benchmark's layout, and return what to say about it.

    Args:
        source: what `classify` or `retrieve` evaluates.
        out: folder of the set.
        split: which part is read and written.
        images: folder where the picture paths of a file of captions start.
        classnames: as in `ClassifyConfig`.
        templates: as in `ClassifyConfig`.
        samples_per_shard: of all shards but the last.

    Raises:
        UserError: the input is none of the known ones, or `out` already holds the split.
        IntegrityError: a picture or label is damaged.
    """
    if holds_captions(source, split=split):
        if (classnames, templates) != ("auto", "auto"):
            raise UserError(f"{source} holds captions: --classnames and --templates mean nothing for it")
        captioned = (
            open_annotations(str(source), images=str(images) if images else None, split=split)
            if source.is_file()
            else open_captioned_shards(str(source), split=split)
        )
        number = write_layout(
            out, _captioned(captioned), kind=Kind.retrieval, split=split, samples_per_shard=samples_per_shard
        )
        return f"{number:,} pictures with {len(captioned.captions):,} captions in {out / split}"
    if images is not None:
        raise UserError(f"--images {images} is only for files of captions")
    labelled = open_labelled_images(str(source), split=split, classnames=classnames, templates=templates)
    if not isinstance(labelled.templates, list):
        raise UserError("clip-benchmark's layout has templates for all classes, not prompts of each: leave .json out")
    number = write_layout(
        out,
        _labelled(labelled),
        kind=Kind.multilabel if labelled.multilabel else Kind.classification,
        split=split,
        classnames=labelled.classnames,
        templates=labelled.templates,
        samples_per_shard=samples_per_shard,
    )
    remarks = "".join(f"\n{warning}" for warning in labelled.warnings)
    return f"{number:,} pictures of {len(labelled.classnames):,} classes in {out / split}{remarks}"


def holds_captions(source: Path, *, split: str) -> bool:
    """Return whether an input holds captions rather than classes."""
    if source.is_file():
        if source.suffix.lower() not in LABEL_TABLES:
            return True
        with reading(source):
            columns, _ = read_csv(source, sep="\t" if source.suffix.lower() == ".tsv" else ",")
        return not set(columns) & set(LABEL_COLUMNS)
    if has_layout(source, split=split):
        return kind_of(source) is Kind.retrieval
    if any(source.glob("*.tar")):
        first = next(read_samples(expand_shards(str(source))[0]), None)
        return first is not None and "cls" not in first.members
    return False


def _captioned(images: CaptionedImages) -> Iterator[LabelledPicture]:
    starts = np.searchsorted(images.owner, np.arange(len(images.source) + 1))
    for i in range(len(images.source)):
        own = images.captions[starts[i] : starts[i + 1]]
        # A caption is a line there; what would end it becomes a blank.
        yield _picture(images.source, i, "\n".join(" ".join(caption.splitlines()) for caption in own).encode())


def _labelled(images: LabelledImages) -> Iterator[LabelledPicture]:
    for i in range(len(images.source)):
        if images.multilabel:
            label = multi_hot(np.flatnonzero(images.labels[i]).tolist(), num_classes=len(images.classnames))
        else:
            label = str(images.labels[i]).encode()
        yield _picture(images.source, i, label)


def _picture(source: ImageSource, i: int, label: bytes) -> LabelledPicture:
    return LabelledPicture(source.key(i), source.read(i), label)
