"""Check shards before a run costs anything: every defect with shard and key, and what training should know."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.data.captions import CaptionChooser, caption_extensions
from clip_train.data.config import DataConfig
from clip_train.data.images.decode import BadSampleError
from clip_train.data.index.files import ShardEntry, read_listing
from clip_train.data.index.jobs import run_jobs
from clip_train.data.index.tar import read_samples
from clip_train.data.remote.config import cache_in
from clip_train.data.remote.mirror import mirrored
from clip_train.data.shard_file import find_files
from clip_train.data.shards.inspect import (
    CaptionTokenizer,
    Defect,
    Inspection,
    Severity,
    ShardFindings,
    caption_hash,
)
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.data.shard_file import ShardFile

MAX_DUPLICATES = 0.01  # share of a batch's rows that may share a caption before it is said
MAX_BAD_FRACTION = DataConfig().max_bad_fraction
_TOP_CAPTIONS = 10
_QUANTILES = (0, 0.5, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was found in all shards."""

    numbers: dict[str, Any]
    """Counts and distributions by name, as `--json` prints them."""
    warnings: list[str]
    """What is worth knowing of the whole, in sentences."""
    defects: list[Defect]
    """In the order of the shards."""

    @property
    def would_stop(self) -> bool:
        """Whether a run on these shards would stop: there is damage, no sample, or too many cannot be used."""
        numbers = self.numbers
        return bool(numbers["damage"]) or not numbers["samples"] or numbers["unusable_share"] > MAX_BAD_FRACTION


def check_source(
    patterns: str | Sequence[str], *, tokenizer: CaptionTokenizer, batch_size: int, world: int = 1, workers: int = 2,
    caption: str = "txt", index_dir: Path | None = None, jobs: int = 1, cache_dir: Path | None = None,
) -> CheckReport:  # fmt: skip
    """Read every sample of the shards that patterns name, as a run would.

    Args:
        patterns: as for `data.train`.
        tokenizer: measures captions.
        batch_size: global, for the duplicates to expect.
        world: ranks of the run to come.
        workers: loader processes per rank.
        caption: as `data.caption`.
        index_dir: where the index is; None looks beside the shards.
        jobs: processes.
        cache_dir: where remote shards lie while they are read; None takes the default of `data.cache.dir`.

    Raises:
        UserError: shards are missing or cannot be opened, or a number is out of range.
    """
    limits = (("batch-size", batch_size, 1), ("world", world, 1), ("jobs", jobs, 1), ("workers", workers, 0))
    for name, value, least in limits:
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    fields = DataConfig(caption=caption).caption_fields()
    captions = caption_extensions(fields)
    shards = find_files(patterns, field="shards", cache=cache_in(cache_dir))
    inspection = Inspection(chooser=CaptionChooser(fields), captions=captions, tokenizer=tokenizer)
    with ExitStack() as stack:
        if shards[0].cache is not None:
            root = index_dir or Path(stack.enter_context(TemporaryDirectory()))
            shards = mirrored(shards, root=root, captions=captions, own_index=index_dir is not None)
            index_dir = None
        entries, defects = _entries(shards, captions=captions, index_dir=index_dir)
        found = list(run_jobs(inspection, [(shard, entries.get(shard.path)) for shard in shards], jobs=jobs))
        defects += [defect for shard in found for defect in shard.defects]
        counted = _count(found, defects=defects, context_length=tokenizer.context_length)
        counted["duplicates"] = _duplicates(found, batch_size=batch_size, inspection=inspection)
    return CheckReport(
        numbers=counted,
        warnings=_warnings(counted, found=found, batch_size=batch_size, world=world, workers=workers),
        defects=defects,
    )


def expected_duplicates(counts: np.ndarray, *, batch_size: int) -> float:
    """Return the share of a random batch's rows that share their caption with another row.

    A batch holds B of N different samples, so a row whose caption occurs c times is alone with it in a share
    binom(N - c, B - 1) / binom(N - 1, B - 1) of the batches.

    Args:
        counts: samples of each caption, [n].
        batch_size: rows B.
    """
    total = int(counts.sum())
    others = min(batch_size, total) - 1
    share = 0.0
    for count, captions in zip(*np.unique(counts, return_counts=True), strict=True):
        rest = total - int(count)
        alone = math.exp(_log_binomial(rest, others) - _log_binomial(total - 1, others)) if rest >= others else 0.0
        share += captions * count / total * (1 - alone if count > 1 else 0.0)
    return share


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _entries(
    shards: Sequence[ShardFile], *, captions: tuple[str, ...], index_dir: Path | None
) -> tuple[dict[Path, ShardEntry], list[Defect]]:
    entries: dict[Path, ShardEntry] = {}
    defects = []
    for folder, shard in sorted({shard.path.parent: shard for shard in shards}.items()):
        try:
            listing = read_listing(folder, captions=captions, index_dir=index_dir)
            entries.update((entry.path, entry) for entry in listing.values())
        except IntegrityError as error:
            place, detail = shard.named(str(folder)), shard.named(str(error))
            defects.append(Defect(Severity.damage, place, None, "damaged_index", detail))
    return entries, defects


def _count(found: Sequence[ShardFindings], *, defects: Sequence[Defect], context_length: int) -> dict[str, Any]:
    by_severity = Counter(defect.severity for defect in defects)
    incomplete = sum(shard.incomplete for shard in found)
    pairs = sum(shard.pairs for shard in found)
    bad = {(d.shard, d.key) for d in defects if d.severity == Severity.unusable}
    unusable = len(bad) - incomplete
    tokens = np.concatenate([shard.tokens for shard in found])
    sizes = np.concatenate([shard.sizes for shard in found])
    return {
        "shards": len(found),
        "indexed_shards": sum(shard.indexed for shard in found),
        "samples": pairs,
        "left_out_by_filter": sum(shard.left_out for shard in found),
        "incomplete": incomplete,
        "unusable": unusable,
        "unusable_share": unusable / pairs if pairs else 0.0,
        "damage": by_severity[Severity.damage],
        "checksums_compared": sum(shard.with_crc for shard in found),
        "reasons": dict(sorted(Counter(defect.reason for defect in defects).items())),
        "samples_per_shard": _quantiles(np.array([shard.pairs for shard in found])),
        "members": dict(sum((shard.extensions for shard in found), Counter[str]()).most_common()),
        "formats": dict(sum((shard.modes for shard in found), Counter[str]()).most_common()),
        "width": _quantiles(sizes[:, 0]),
        "height": _quantiles(sizes[:, 1]),
        "tokens": _quantiles(tokens),
        "context_length": context_length,
        "captions_cut_share": float((tokens > context_length).mean()) if len(tokens) else 0.0,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, median, high = np.quantile(values, _QUANTILES).tolist()
    return {"least": low, "median": median, "most": high, "mean": round(float(values.mean()), 2)}


def _duplicates(found: Sequence[ShardFindings], *, batch_size: int, inspection: Inspection) -> dict[str, Any]:
    hashes, first, counts = np.unique(
        np.concatenate([shard.captions for shard in found]), return_index=True, return_counts=True
    )
    result: dict[str, Any] = {"batch_size": batch_size, "distinct_captions": len(hashes), "share": 0.0, "top": []}
    if not len(hashes):
        return result
    result["share"] = expected_duplicates(counts, batch_size=batch_size)
    # By count, then by place: stable among equals.
    top = [row for row in np.lexsort((first, -counts))[:_TOP_CAPTIONS] if counts[row] > 1]
    starts = np.cumsum([0] + [len(shard.captions) for shard in found])
    for row in top:
        shard = found[int(np.searchsorted(starts, first[row], side="right")) - 1].shard
        text = _find_caption(shard, int(hashes[row]), inspection=inspection)
        result["top"].append({"count": int(counts[row]), "share": counts[row] / counts.sum(), "caption": text})
    return result


def _find_caption(shard: ShardFile, wanted: int, *, inspection: Inspection) -> str:
    """Read a shard again for the caption with a hash: texts are not kept, since a set may hold billions."""
    with shard.here() as path, path.open("rb") as file:
        for sample in read_samples(path):
            if sample.members.keys() >= set(inspection.captions):
                with suppress(BadSampleError):
                    caption = inspection.captions_of(file, sample)[0]
                    if caption_hash(caption) == wanted:
                        return caption
    raise IntegrityError(f"{shard.location} changed while it was checked")


def _warnings(
    numbers: dict[str, Any], *, found: Sequence[ShardFindings], batch_size: int, world: int, workers: int
) -> list[str]:
    warnings = []
    duplicates, samples = numbers["duplicates"], numbers["samples"]
    if duplicates["share"] > MAX_DUPLICATES:
        warnings.append(
            f"{duplicates['share']:.1%} of the rows of a batch of {batch_size:,} share their caption with another row: "
            "such pairs are false negatives (loss.duplicates=ignore leaves them out)"
        )
    if samples < batch_size:
        warnings.append(f"{samples:,} samples are fewer than a batch of {batch_size:,}")
    if numbers["captions_cut_share"] > 0:
        warnings.append(
            f"{numbers['captions_cut_share']:.1%} of the captions are cut at {numbers['context_length']} tokens"
        )
    if len(found) < world * max(workers, 1):
        warnings.append(
            f"{len(found)} shards are fewer than {world} ranks x {workers} workers: data.reader=streaming needs at "
            "least that many"
        )
    sizes = numbers["samples_per_shard"]
    if sizes and sizes["most"] > 2 * max(sizes["median"], 1):
        most = max(found, key=lambda shard: shard.pairs)
        warnings.append(f"{most.shard.location} holds {most.pairs:,} samples, the median shard {sizes['median']:,.0f}")
    empty = [findings.shard.location for findings in found if not findings.pairs]
    if empty:
        warnings.append(f"{len(empty)} shards hold no sample, such as {empty[0]}")
    if numbers["indexed_shards"] < len(found):
        warnings.append(f"{len(found) - numbers['indexed_shards']} shards have no index yet")
    if numbers["checksums_compared"] < samples:
        warnings.append(
            f"{samples - numbers['checksums_compared']:,} samples have no checksum (`shards index --crc` adds them)"
        )
    return warnings
