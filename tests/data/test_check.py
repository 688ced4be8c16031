"""`shards check` finds every planted defect of shards and pictures, with shard and key."""

import io
import json
import math
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clip_train.cli_shards import shards as command
from clip_train.data.shards.check import CheckReport, check_source, expected_duplicates
from clip_train.data.shards.check_text import as_text
from clip_train.data.shards.index import index_source
from clip_train.errors import UserError
from clip_train.tokenizer.bpe import ClipTokenizer
from tests.data.made import encoded, numbered_shards, picture, write_shard
from tests.data.test_decode import _png_header_of


def _check(folder, **options) -> CheckReport:
    return check_source(str(folder), tokenizer=ClipTokenizer(), **({"batch_size": 8} | options))


def _found(report: CheckReport) -> set[tuple[str, str, str | None, str]]:
    return {(d.severity, Path(d.shard).name, d.key, d.reason) for d in report.defects}


JPEG = encoded(picture(1, size=(40, 30)), "JPEG", quality=90)
PNG = encoded(picture(2, size=(40, 30)))


def _flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def _text_bomb() -> bytes:
    """A PNG with a compressed text of 20 MB in 20 KB before its pixels."""
    text = b"k\0\0" + zlib.compress(bytes(20_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return PNG[:33] + chunk + PNG[33:]


def _exif(content: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(content, "JPEG", exif=exif.tobytes())


# key -> (extension, picture, caption, reason or None)
BAD_SAMPLES = {
    "empty_image": ("jpg", b"", b"x", "empty_image"),
    "html": ("jpg", b"<!doctype html><html></html>", b"x", "unknown_format"),
    "svg": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"x", "unknown_format"),
    "heic": ("jpg", b"\0\0\0\x18ftypheic" + bytes(200), b"x", "unknown_format"),
    "cut_jpeg": ("jpg", JPEG[:-200], b"x", "undecodable"),
    "cut_png": ("png", PNG[: len(PNG) // 2], b"x", "undecodable"),
    "flipped_png": ("png", _flipped(PNG), b"x", "undecodable"),
    "one_pixel": ("png", encoded(picture(3, size=(1, 1))), b"x", "too_small"),
    "narrow": ("png", encoded(picture(3, size=(5000, 17))), b"x", "too_narrow"),
    "bomb": ("png", _png_header_of(30_000, 20_000), b"x", "too_many_pixels"),
    "caption_empty": ("jpg", JPEG, b"", "caption_empty"),
    "caption_blank": ("jpg", JPEG, b" \n\t", "caption_empty"),
    "caption_huge": ("jpg", JPEG, b"word " * 200_000, "caption_too_long"),
    "caption_latin1": ("jpg", JPEG, "Möwe".encode("latin-1"), "caption_not_utf8"),
}


def _animated() -> bytes:
    return encoded(picture(1).convert("P"), "GIF", save_all=True, append_images=[picture(2).convert("P")])


GOOD_PICTURES = {
    "cmyk": ("jpg", encoded(picture(1).convert("CMYK"), "JPEG"), "JPEG CMYK"),
    "grey": ("jpg", encoded(picture(1).convert("L"), "JPEG"), "JPEG L"),
    "grey_alpha": ("png", encoded(picture(1).convert("LA")), "PNG LA"),
    "alpha": ("png", encoded(picture(1).convert("RGBA")), "PNG RGBA"),
    "palette": ("png", encoded(picture(1).convert("P")), "PNG P"),
    "one_bit": ("png", encoded(picture(1).convert("1")), "PNG 1"),
    "grey16": ("png", encoded(Image.fromarray(np.full((20, 20), 300, np.uint16))), "PNG I;16"),
    "float": ("tif", encoded(Image.fromarray(np.full((20, 20), 0.3, np.float32)), "TIFF"), "TIFF F"),
    "rotated": ("jpg", _exif(picture(1)), "JPEG RGB"),
    "animated": ("gif", _animated(), "GIF P"),
    "broken_profile": ("jpg", encoded(picture(1), "JPEG", icc_profile=b"no profile"), "JPEG RGB"),
    "webp": ("webp", encoded(picture(1), "WEBP"), "WEBP RGB"),
}


def test_every_unusable_sample_is_found_with_its_reason_and_no_usable_one(tmp_path):
    samples = [{"__key__": key, ext: content, "txt": text} for key, (ext, content, text, _) in BAD_SAMPLES.items()]
    samples += [{"__key__": key, ext: content, "txt": b"fine"} for key, (ext, content, _) in GOOD_PICTURES.items()]
    samples += [{"__key__": "no_caption", "jpg": JPEG, "cls": b"1"}, {"__key__": "no_picture", "txt": b"x"}]
    samples += [{"__key__": "odd_name", "jpg": JPEG, "jpeg.txt": b"x"}]
    write_shard(tmp_path / "a.tar", samples)
    report = _check(tmp_path)
    expected = {("unusable", "a.tar", key, reason) for key, (*_, reason) in BAD_SAMPLES.items()}
    expected |= {("unusable", "a.tar", key, "caption_missing") for key in ("no_caption", "odd_name")}
    expected.add(("unusable", "a.tar", "no_picture", "image_missing"))
    assert _found(report) == expected
    usable = Counter(mode for *_, mode in GOOD_PICTURES.values())
    captions = Counter({"JPEG RGB": sum(key.startswith("caption_") for key in BAD_SAMPLES)})
    assert report.numbers["formats"] == dict(usable + captions)
    assert report.numbers["samples"] == len(BAD_SAMPLES) + len(GOOD_PICTURES)
    assert (report.numbers["unusable"], report.numbers["incomplete"]) == (len(BAD_SAMPLES), 3)
    details = {d.key: d.detail for d in report.defects}
    assert "web page" in details["html"] and "HEIC" in details["heic"] and "SVG" in details["svg"]
    assert details["odd_name"] == "only jpeg.txt+jpg"
    assert report.would_stop


def test_a_compressed_text_bomb_is_unusable(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "zip", "png": _text_bomb(), "txt": b"x"}])
    (severity, _, key, reason), *more = _found(_check(tmp_path))
    assert (severity, key, reason, more) == ("unusable", "zip", "unknown_format", [])


def _tar_bytes(samples: int = 4, *, extra=lambda tar: None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            _add(tar, f"{number:04d}.png", encoded(picture(number)))
            _add(tar, f"{number:04d}.txt", b"n %d" % number)
        extra(tar)
    return buffer.getvalue()


def _add(tar, name, content, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def _headers(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar]


def _with_bytes(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def _sparse(data: bytes) -> bytes:
    header = bytearray(data[:512])
    header[156:157] = b"S"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


TAR = _tar_bytes()
HEADERS = _headers(TAR)
# name -> (content, last key before the damage, part of the message)
DAMAGED_SHARDS = {
    "cut": (TAR[: HEADERS[4] + 700], "0000", "cut off"),
    "cut_between_members": (TAR[: HEADERS[6]], "0001", "cut off"),
    "no_end_marker": (TAR[: HEADERS[7] + 1024], "0002", "no end marker"),
    "bad_checksum": (_with_bytes(TAR, HEADERS[4] + 20, b"?"), "0000", f"at byte {HEADERS[4]}: the header checksum"),
    "zero_block": (_with_bytes(TAR, HEADERS[4], bytes(512)), "0000", f"at byte {HEADERS[4]}: a zero block"),
    "empty": (b"", None, "0 bytes"),
    "html": (b"<html>" + b"not found " * 100, None, "HTML"),
    "gzip": (b"\x1f\x8b" + bytes(1000), None, "gzip"),
    "repeated_member": (_tar_bytes(extra=lambda t: _add(t, "0003.PNG", b"")), "0002", "two members .png"),
    "scattered": (_tar_bytes(extra=lambda t: _add(t, "0001.cls", b"1")), "0003", "'0001' are not next to each other"),
    "symbolic_link": (
        _tar_bytes(extra=lambda t: _add(t, "l.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "0002",
        "symbolic link",
    ),
    "hard_link": (_tar_bytes(extra=lambda t: _add(t, "l.png", b"", type=tarfile.LNKTYPE)), "0002", "hard link"),
    "device": (_tar_bytes(extra=lambda t: _add(t, "l.png", b"", type=tarfile.CHRTYPE)), "0002", "device"),
    "sparse": (_sparse(TAR), None, "sparse"),
    "huge_header": (
        _tar_bytes(extra=lambda t: _add(t, "x", bytes(2 << 20), type=tarfile.XHDTYPE)), "0002", "an extended header",
    ),
}  # fmt: skip


def test_every_damaged_shard_is_found_and_the_others_are_checked_all_the_same(tmp_path):
    for name, (content, _, _) in DAMAGED_SHARDS.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    (tmp_path / "whole.tar").write_bytes(TAR)
    report = _check(tmp_path)
    assert _found(report) == {
        ("damage", f"{n}.tar", last, "damaged_shard") for n, (_, last, _) in DAMAGED_SHARDS.items()
    }
    details = {Path(d.shard).stem: d.detail for d in report.defects}
    assert all(message in details[name] for name, (*_, message) in DAMAGED_SHARDS.items())
    assert report.would_stop


def test_a_folder_named_like_a_shard_and_numbers_out_of_range_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="--batch-size=0"):
        _check(tmp_path, batch_size=0)
    with pytest.raises(UserError, match="--workers=-1"):
        _check(tmp_path, workers=-1)
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x\.tar"):
        _check(tmp_path)


def test_odd_names_are_no_damage(tmp_path):
    def extra(tar):
        for name in ("../out", "/etc/absolute", "x" * 60):
            _add(tar, f"{name}.png", encoded(picture(9)))
            _add(tar, f"{name}.txt", b"y")
        tar.format = tarfile.GNU_FORMAT
        tar.addfile(tarfile.TarInfo("f" * 10_000 + ".txt"))

    (tmp_path / "a.tar").write_bytes(_tar_bytes(extra=extra))
    found = _found(_check(tmp_path))
    assert {(key[:20], reason) for _, _, key, reason in found} == {
        ("../out", "unsafe_name"), ("/etc/absolute", "unsafe_name"), ("f" * 20, "image_missing"),
    }  # fmt: skip


def test_what_contradicts_the_index_is_damage(tmp_path):
    for name in ("checksum", "grown", "records", "statistics", "listing"):
        numbered_shards(tmp_path / name, [4, 4])
        index_source(str(tmp_path / name), crc=True)
    path = tmp_path / "checksum" / "s-001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"n 6", b"n 9"))  # content of the same length: only the checksum tells
    write_shard(tmp_path / "grown" / "s-000.tar", [{"__key__": "0", "png": PNG, "txt": b"new"}])
    (tmp_path / "records" / "s-000.idx").write_bytes(bytes(4 * 32))
    (tmp_path / "statistics" / "s-000_stats.json").write_text(json.dumps({"successes": 5}))
    (tmp_path / "listing" / "index.json").write_text("{")
    expected = {
        "checksum": ("s-001.tar", "0002", "wrong_checksum"),
        "grown": ("s-000.tar", None, "stale_index"),
        "records": ("s-000.tar", None, "stale_index"),
        "statistics": ("s-000.tar", None, "wrong_count"),
        "listing": ("listing", None, "damaged_index"),
    }
    for name, (shard, key, reason) in expected.items():
        assert _found(_check(tmp_path / name)) == {("damage", shard, key, reason)}


def test_samples_that_a_filter_left_out_are_not_complained_of(tmp_path):
    numbered_shards(tmp_path, [5, 5], bad={3, 7})
    index_source(str(tmp_path), conditions=["width>0"])
    report = _check(tmp_path)
    assert (report.numbers["samples"], report.numbers["left_out_by_filter"], report.defects) == (8, 2, [])


def test_the_expected_duplicates_equal_those_of_drawn_batches():
    rng = np.random.default_rng(0)
    counts = np.array([500, 100, 20, *[2] * 40, *[1] * 4000])
    captions = np.repeat(np.arange(len(counts)), counts)
    shares = []
    for _ in range(300):
        batch = rng.choice(captions, 256, replace=False)
        _, inverse, seen = np.unique(batch, return_inverse=True, return_counts=True)
        shares.append((seen[inverse] > 1).mean())
    assert expected_duplicates(counts, batch_size=256) == pytest.approx(np.mean(shares), abs=0.002)
    assert expected_duplicates(np.array([7]), batch_size=2) == pytest.approx(1)
    assert expected_duplicates(np.array([1, 1]), batch_size=2) == 0
    # In a large set, draws with and without replacement agree: sum of f (1 - (1 - f)^(B - 1)).
    large = np.array([3 * 10**5, 10**4, 10**9])
    shares = large / large.sum()
    expected = (shares * (1 - (1 - shares) ** 4095)).sum()
    assert expected_duplicates(large, batch_size=4096) == pytest.approx(expected, rel=1e-6)


def test_numbers_and_notes_of_a_set(tmp_path):
    texts = ["the same words"] * 6 + ["twice"] * 2 + ["word " * 100] + [f"number {n}" for n in range(91)]
    for shard, part in enumerate([texts[:10], texts[10:20], texts[20:]]):
        samples = [{"__key__": f"{i:04d}", "jpg": JPEG, "txt": text.encode()} for i, text in enumerate(part)]
        write_shard(tmp_path / f"{shard}.tar", samples)
    index_source(str(tmp_path))
    report = _check(tmp_path, batch_size=32, world=2, workers=2)
    numbers = report.numbers
    assert numbers["duplicates"]["top"] == [
        {"count": 6, "share": 0.06, "caption": "the same words"}, {"count": 2, "share": 0.02, "caption": "twice"},
    ]  # fmt: skip
    alone = {count: math.comb(100 - count, 31) / math.comb(99, 31) for count in (2, 6)}
    expected = 0.06 * (1 - alone[6]) + 0.02 * (1 - alone[2])
    assert numbers["duplicates"]["share"] == pytest.approx(expected)
    assert (numbers["tokens"]["least"], numbers["tokens"]["most"]) == (3, 102)
    assert numbers["captions_cut_share"] == 0.01
    assert (numbers["width"]["median"], numbers["height"]["median"]) == (40, 30)
    notes = "\n".join(report.warnings)
    for part in ("of the rows of a batch of 32", "1.0% of the captions are cut at 77", "2 ranks x 2 workers"):
        assert part in notes
    assert "2.tar holds 80 samples, the median shard 10" in notes
    assert "100 samples have no checksum" in notes
    assert report.defects == [] and not report.would_stop


@pytest.mark.slow
def test_samples_without_the_field_that_captions_come_from_count_as_unusable(tmp_path):
    sample = {"jpg": JPEG, "json": b'{"alt": "x"}'}
    write_shard(tmp_path / "a.tar", [{"__key__": key, **sample} for key in "01"] + [{"__key__": "2", "jpg": JPEG}])
    report = _check(tmp_path, caption="json:atl")
    assert (report.numbers["incomplete"], report.numbers["unusable"], report.would_stop) == (1, 2, True)


def test_shards_without_any_sample_would_stop_a_run(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "txt": b"x"}])
    report = _check(tmp_path)
    assert report.would_stop and "they hold no sample" in as_text(report)


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path):
    numbered_shards(tmp_path, [3, 4, 2], bad={4})
    alone, together = _check(tmp_path, jobs=1), _check(tmp_path, jobs=2)
    assert (alone.numbers, alone.warnings, alone.defects) == (together.numbers, together.warnings, together.defects)


def test_captions_may_come_from_json(tmp_path):
    rows = {"a": {"alt": ["words", "more words"]}, "b": {"alt": ["words", 3]}, "c": {}}
    write_shard(
        tmp_path / "a.tar",
        [{"__key__": key, "jpg": JPEG, "json": json.dumps(row).encode()} for key, row in rows.items()],
    )
    report = _check(tmp_path, caption="json:alt")
    assert {(key, reason) for *_, key, reason in _found(report)} == {
        ("b", "caption_not_text"), ("c", "caption_missing"),
    }  # fmt: skip
    assert (report.numbers["tokens"]["least"], report.numbers["tokens"]["most"]) == (3, 4)
    with pytest.raises(UserError, match=r"data\.caption"):
        _check(tmp_path, caption="alt")


@pytest.mark.parametrize(("bad", "code"), [(set(), 0), ({5}, 3)])
def test_the_command_exits_with_3_if_a_run_would_stop(tmp_path, bad, code):
    numbered_shards(tmp_path, [10, 10], bad=bad)
    done = CliRunner().invoke(command, ["check", str(tmp_path), "--batch-size", "4", "--jobs", "1"])
    assert done.exit_code == code, done.output
    assert ("can be trained on" in done.output) == (code == 0)
    assert ("s-000.tar 0005: 13 bytes that begin with b'not a pi'" in done.output) == bool(bad)
    as_json = CliRunner().invoke(command, ["check", str(tmp_path), "--json", "--jobs", "1"])
    document = json.loads(as_json.stdout)
    assert (document["would_stop"], document["samples"], len(document["defects"])) == (bool(bad), 20, len(bad))
