"""What `shards check` prints: for people, and as JSON."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_train.data.shards.check import CheckReport
    from clip_train.data.shards.inspect import Defect

_SHOWN_PER_REASON = 5


def as_json(report: CheckReport) -> str:
    """Return everything that was found as one JSON object."""
    document = {
        "would_stop": report.would_stop,
        **report.numbers,
        "warnings": report.warnings,
        "defects": [defect._asdict() for defect in report.defects],
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def as_text(report: CheckReport) -> str:
    """Return a summary, with the first defects of each kind."""
    return "\n".join([*_numbers(report.numbers), *_defects(report), *_warnings(report), _verdict(report)])


def _numbers(numbers: dict[str, Any]) -> list[str]:
    duplicates = numbers["duplicates"]
    rows = [
        ("shards", f"{numbers['shards']:,}, {numbers['indexed_shards']:,} of them indexed"),
        (
            "samples",
            f"{numbers['samples']:,}; {numbers['incomplete']:,} incomplete, {numbers['left_out_by_filter']:,} left out "
            f"by the filter, {numbers['unusable']:,} unusable ({numbers['unusable_share']:.2%})",
        ),
        ("per shard", _range(numbers["samples_per_shard"])),
        ("members", _counts(numbers["members"])),
        ("pictures", _counts(numbers["formats"])),
        ("width", _range(numbers["width"])),
        ("height", _range(numbers["height"])),
        (
            "tokens",
            f"{_range(numbers['tokens'])}; {numbers['captions_cut_share']:.2%} of the captions are cut at "
            f"{numbers['context_length']}",
        ),
        ("captions", f"{duplicates['distinct_captions']:,} different ones"),
        (
            "duplicates",
            f"{duplicates['share']:.2%} of the rows of a batch of {duplicates['batch_size']:,} share their caption "
            "with another row",
        ),
    ]
    lines = [f"{name:<12}{value}" for name, value in rows]
    return lines + [f"{row['count']:>22,} x {row['caption'][:80]!r}" for row in duplicates["top"]]


def _defects(report: CheckReport) -> list[str]:
    order = {"damage": 0, "unusable": 1, "warning": 2}
    in_order = sorted(report.defects, key=lambda defect: (order[defect.severity], defect.reason))
    lines = []
    for (severity, reason), group in groupby(in_order, key=lambda defect: (defect.severity, defect.reason)):
        defects = list(group)
        lines.append(f"\n{severity}: {len(defects):,} {reason}")
        for defect in defects[:_SHOWN_PER_REASON]:
            lines.append(f"  {_sentence(defect)}")
        if len(defects) > _SHOWN_PER_REASON:
            lines.append(f"  and {len(defects) - _SHOWN_PER_REASON:,} more (--json lists all)")
    return lines


def _sentence(defect: Defect) -> str:
    if defect.detail.startswith(defect.shard):  # an error of the shard, with its place in it
        return defect.detail + (f" (the last whole sample is {defect.key})" if defect.key else "")
    where = f"{defect.shard} {defect.key}" if defect.key else defect.shard
    return f"{where}: {defect.detail}" if defect.detail else where


def _warnings(report: CheckReport) -> list[str]:
    return ["", *(f"note: {warning}" for warning in report.warnings)] if report.warnings else []


def _verdict(report: CheckReport) -> str:
    numbers = report.numbers
    if numbers["damage"]:
        return f"\na run on these shards would stop: {numbers['damage']:,} places are damaged"
    if not numbers["samples"]:
        return "\na run on these shards would stop: they hold no sample"
    if report.would_stop:
        return f"\na run on these shards would stop: {numbers['unusable_share']:.1%} of the samples cannot be used"
    return "\nthese shards can be trained on"


def _range(values: dict[str, float]) -> str:
    if not values:
        return "none"
    return (
        f"{values['least']:,.0f} to {values['most']:,.0f}, median {values['median']:,.0f}, mean {values['mean']:,.1f}"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
