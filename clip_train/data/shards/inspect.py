"""Read every sample of one shard as the trainer would, and note what is wrong with it."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

import numpy as np

from clip_train.data.images.decode import BadSampleError, decode_image, open_image
from clip_train.data.index.files import HAS_CRC, ShardEntry, check_sizes
from clip_train.data.index.tar import BLOCK, Member, TarSample, read_samples
from clip_train.data.index.walk import picture_of, stated_pictures
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.data.captions import CaptionChooser
    from clip_train.data.shard_file import ShardFile

_FORMAT_OF = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"} | {
    extension: extension.upper() for extension in ("png", "webp", "gif", "bmp", "tiff", "avif")
}
# What a picture of unknown format is, by its first bytes (at the place given).
_SIGNATURES = (
    (0, b"<svg", "SVG"), (0, b"<?xml", "XML or SVG"), (0, b"<", "a web page"), (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"), (0, b"8BPS", "Photoshop"), (4, b"ftypheic", "HEIC, for which there is no decoder"),
    (4, b"ftypheix", "HEIC, for which there is no decoder"), (4, b"ftypmif1", "HEIF, for which there is no decoder"),
    (4, b"ftypavif", "AVIF, for which this Pillow has no decoder"),
    (0, b"\xff\x0a", "JPEG XL, for which there is no decoder"), (4, b"JXL ", "JPEG XL, for which there is no decoder"),
)  # fmt: skip


class Severity(StrEnum):
    """What a defect does to a run."""

    damage = "damage"
    """It stops the run."""
    unusable = "unusable"
    """The sample is substituted or masked, or has no place; too many stop the run."""
    warning = "warning"
    """Nothing, but it may not be meant."""


class Defect(NamedTuple):
    """Something wrong with a shard, or with a sample of it."""

    severity: Severity
    shard: str
    key: str | None  # of the sample; for damage of a shard, of the last whole sample before it
    reason: str  # one of few words
    detail: str


@dataclass(slots=True, kw_only=True)
class ShardFindings:
    """What one shard holds."""

    shard: ShardFile
    pairs: int = 0  # samples with picture and caption that the index keeps
    left_out: int = 0  # pairs that the index leaves out
    incomplete: int = 0  # samples without the members of a pair, which have no place in the order
    indexed: bool = False
    with_crc: int = 0  # samples whose checksums were compared
    defects: list[Defect] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)  # members
    modes: Counter[str] = field(default_factory=Counter)  # usable pictures, such as "JPEG RGB"
    captions: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # [n] hash of each sample's first one
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # lengths of all usable captions
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))  # [m, 2] width, height

    def add(self, severity: Severity, key: str | None, reason: str, detail: str = "") -> None:
        """Note a defect."""
        self.defects.append(Defect(severity, self.shard.location, key, reason, self.shard.named(detail)))


class CaptionTokenizer(Protocol):
    """What the check needs of a tokenizer."""

    context_length: int
    start_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without start and end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """How samples are looked at.

    Args:
        chooser: finds the captions of a sample.
        captions: extensions of the members that hold captions.
        tokenizer: measures captions.
    """

    chooser: CaptionChooser
    captions: tuple[str, ...]
    tokenizer: CaptionTokenizer

    def __call__(self, task: tuple[ShardFile, ShardEntry | None]) -> ShardFindings:
        """Inspect one shard, given its entry in the index if it has one.

        Raises:
            UserError: the shard cannot be opened.
        """
        shard, entry = task
        with shard.here() as path:
            return self._look_at(path, shard=shard, entry=entry)

    def _look_at(self, path: Path, *, shard: ShardFile, entry: ShardEntry | None) -> ShardFindings:
        findings = ShardFindings(shard=shard, indexed=entry is not None)
        records = _records(entry, findings) if entry is not None else None
        hashes: list[int] = []
        tokens: list[int] = []
        sizes: list[tuple[int, int]] = []
        last: str | None = None
        pictures = 0
        try:
            with path.open("rb") as file:
                for sample in read_samples(path):
                    last = sample.key
                    findings.extensions.update(sample.members.keys())
                    pictures += picture_of(sample) is not None
                    if not self._is_pair(sample, findings):
                        findings.incomplete += 1
                    elif _is_kept(sample, records, findings):
                        self._inspect(file, sample, findings, hashes=hashes, tokens=tokens, sizes=sizes)
                        _compare_checksums(file, sample, records, findings, captions=self.captions)
            stated = stated_pictures(path)
            if stated is not None and stated != pictures:
                findings.add(
                    Severity.damage, None, "wrong_count",
                    f"{pictures:,} pictures, but {path.stem}_stats.json counts {stated:,}",
                )  # fmt: skip
        except IntegrityError as error:
            findings.add(Severity.damage, last, "damaged_shard", str(error))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        else:
            unlisted = findings.left_out if entry is not None and entry.filter_sha256 is None else 0
            if entry is not None and records is not None and (findings.pairs != entry.n or unlisted):
                findings.add(
                    Severity.damage, None, "stale_index",
                    f"{entry.n:,} samples indexed, {findings.pairs + unlisted:,} found",
                )  # fmt: skip
        findings.captions = np.array(hashes, dtype=np.uint64)
        findings.tokens = np.array(tokens, dtype=np.int32)
        findings.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        return findings

    def captions_of(self, file: BinaryIO, sample: TarSample) -> list[str]:
        """Return the captions of a sample of an open shard, of which a run draws one.

        Raises:
            BadSampleError: one cannot be used.
        """
        return self.chooser.all([_read(file, sample.members[name]) for name in self.captions])

    def _is_pair(self, sample: TarSample, findings: ShardFindings) -> bool:
        found = "+".join(sorted(sample.members))
        if sample.key.startswith("/") or ".." in sample.key.split("/"):
            findings.add(Severity.warning, sample.key, "unsafe_name", "harmless here: nothing is ever extracted")
        if picture_of(sample) is None:
            findings.add(Severity.unusable, sample.key, "image_missing", f"only {found}")
        elif not sample.members.keys() >= set(self.captions):
            findings.add(Severity.unusable, sample.key, "caption_missing", f"only {found}")
        else:
            return True
        return False

    def _inspect(
        self, file: BinaryIO, sample: TarSample, findings: ShardFindings, *, hashes: list[int], tokens: list[int],
        sizes: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        extension = picture_of(sample)
        assert extension is not None
        content = _read(file, sample.members[extension])
        try:
            height, width, _ = decode_image(content).shape
            image = open_image(content)
            sizes.append((width, height))
            findings.modes[f"{image.format} {image.mode}"] += 1
            if image.format != _FORMAT_OF[extension]:
                findings.add(
                    Severity.warning,
                    sample.key,
                    "wrong_extension",
                    f".{extension} holds {image.format}; decoded as that",
                )
        except BadSampleError as error:
            findings.add(Severity.unusable, sample.key, error.reason, _what_it_is(content, reason=error.reason))
        try:
            captions = self.captions_of(file, sample)
        except BadSampleError as error:
            length = sum(sample.members[name].size for name in self.captions)
            findings.add(Severity.unusable, sample.key, error.reason, f"{length:,} bytes")
            return
        if any(b"\0" in _read(file, sample.members[name]) for name in self.captions):
            findings.add(Severity.warning, sample.key, "caption_with_nul", "each NUL is read as a blank")
        hashes.append(caption_hash(captions[0]))
        special = 1 if self.tokenizer.start_id is None else 2
        tokens += [len(self.tokenizer.encode(caption)) + special for caption in captions]


def caption_hash(caption: str) -> int:
    """Return 64 bits that stand for a caption."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _records(entry: ShardEntry, findings: ShardFindings) -> dict[int, np.void] | None:
    """Return the records of a shard by where their pictures begin; None, and a defect, if they cannot be trusted."""
    try:
        check_sizes(entry)
        content = entry.idx_path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry.idx_sha256:
            raise IntegrityError(f"{entry.idx_path} does not match its hash: index the shard again")
    except (IntegrityError, OSError) as error:
        findings.add(Severity.damage, None, "stale_index", str(error))
        return None
    records = np.frombuffer(content, dtype=entry.record)
    return {int(record["image_block"]) * BLOCK: record for record in records}


def _is_kept(sample: TarSample, records: dict[int, np.void] | None, findings: ShardFindings) -> bool:
    extension = picture_of(sample)
    assert extension is not None
    if records is None or sample.members[extension].offset in records:
        findings.pairs += 1
        return True
    findings.left_out += 1
    return False


def _compare_checksums(
    file: BinaryIO, sample: TarSample, records: dict[int, np.void] | None, findings: ShardFindings, *,
    captions: tuple[str, ...],
) -> None:  # fmt: skip
    extension = picture_of(sample)
    assert extension is not None
    record = records[sample.members[extension].offset] if records else None
    if record is None or not int(record["flags"]) & HAS_CRC:
        return
    findings.with_crc += 1
    fields = ("image", "caption", "json")
    for name, member in zip(fields, (extension, *captions), strict=False):  # one caption member has no field `json`
        if zlib.crc32(_read(file, sample.members[member])) != int(record[f"{name}_crc32"]):
            offset = sample.members[member].offset
            findings.add(
                Severity.damage, sample.key, "wrong_checksum", f".{member} at byte {offset} does not match its crc32"
            )


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _what_it_is(content: bytes, *, reason: str) -> str:
    if reason != "unknown_format":
        return f"{len(content):,} bytes"
    start = content[:256].lstrip()
    known = next((what for place, sign, what in _SIGNATURES if start[place:].lower().startswith(sign.lower())), None)
    return f"it is {known}" if known else f"{len(content):,} bytes that begin with {content[:8]!r}"
