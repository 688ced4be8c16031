"""Decoding against Pillow and against arithmetic."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_train.data.images import decode
from clip_train.data.images.decode import BadSampleError, decode_image, jpeg_header
from clip_train.data.images.transforms import TrainTransform
from tests.data.made import encoded


def _photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 100}]
)
def test_jpegs_decode_to_the_pixels_of_pillow(options):
    content = encoded(_photo(101, 67), "JPEG", **options)
    assert np.array_equal(decode_image(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_grey_jpegs_decode_to_the_pixels_of_pillow():
    content = encoded(_photo(40, 30).convert("L"), "JPEG")
    assert np.array_equal(decode_image(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_four_inks_multiply_what_paper_reflects(image_format):
    inks = np.random.default_rng(4).integers(0, 256, (3, 4, 4)).repeat(8, axis=0).repeat(8, axis=1)  # flat blocks
    image = Image.fromarray(inks.astype(np.uint8), mode="CMYK")
    content = encoded(image, image_format, **({"quality": 100} if image_format == "JPEG" else {}))
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert np.abs(decode_image(content) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(orientation, image_format):
    _skip_without(image_format)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(_photo(48, 32), image_format, exif=exif)
    found = decode_image(content)
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))))
    # Where the corners go, by the definition of the tag: its first row is the visual top, right, bottom or left.
    corners = np.asarray(_photo(48, 32)).astype(int)[[0, 0, -1, -1], [0, -1, 0, -1]]
    places = {1: "0123", 2: "1032", 3: "3210", 4: "2301", 5: "0213", 6: "2031", 7: "3120", 8: "1302"}[orientation]
    expected = corners[[int(place) for place in places]]
    assert np.abs(found[[0, 0, -1, -1], [0, -1, 0, -1]] - expected).mean() < 12
    if image_format == "JPEG":
        assert jpeg_header(content).orientation == orientation


def test_transparency_goes_over_white_in_every_mode_that_has_it():
    rgba = np.random.default_rng(3).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    alpha = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encoded(Image.fromarray(rgba))) - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(rgba[..., 0]), Image.fromarray(rgba[..., 3])])
    expected = rgba[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encoded(grey)) - expected).max() <= 1
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([9, 9, 9, 0, 200, 0])
    assert np.all(decode_image(encoded(palette, transparency=1)) == 255)
    assert np.all(decode_image(encoded(palette, transparency=0)) == [0, 200, 0])
    assert np.all(decode_image(encoded(Image.new("RGB", (20, 20), (1, 2, 3)), transparency=(1, 2, 3))) == 255)


def test_sixteen_bit_and_float_greys_are_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20)
    decoded = decode_image(encoded(Image.fromarray(ramp.astype(np.uint16))))
    assert np.abs(decoded - (ramp / 257)[..., None]).max() <= 0.51
    decoded = decode_image(encoded(Image.fromarray((ramp * 1e-3 - 7).astype(np.float32)), "TIFF"))
    assert np.abs(decoded - (ramp / 257)[..., None]).max() <= 0.51
    assert np.all(decode_image(encoded(Image.new("1", (20, 20), 1))) == 255)


def test_wide_integers_are_scaled_by_their_own_minimum_and_maximum():
    values = np.linspace(-5_000_000, 3_000_000, 20 * 20).reshape(20, 20).astype(np.int32)
    expected = (values + 5_000_000.0) / 8_000_000 * 255
    assert np.abs(decode_image(encoded(Image.fromarray(values), "TIFF")) - expected[..., None]).max() <= 0.51
    flat = Image.fromarray(np.full((20, 20), 1e9, dtype=np.float32))
    assert np.all(decode_image(encoded(flat, "TIFF")) == 0)


def test_sixteen_bit_greys_of_either_byte_order_and_floats_with_holes_are_scaled():
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20)
    big_endian = Image.frombytes("I;16B", (20, 20), ramp.astype(">u2").tobytes())
    assert np.abs(decode_image(encoded(big_endian, "TIFF")) - (ramp / 257)[..., None]).max() <= 0.51
    holes = ramp.astype(np.float32)
    holes[3, 4], holes[5, 6] = np.nan, np.inf
    with_holes = decode_image(encoded(Image.fromarray(holes), "TIFF")).astype(int)
    assert with_holes[3, 4, 0] == 0 and with_holes[5, 6, 0] == 255
    holes[3, 4], holes[5, 6] = 0, 65535
    assert np.abs(with_holes - decode_image(encoded(Image.fromarray(holes), "TIFF"))).max() <= 1


def test_one_bit_and_palette_pictures_show_their_colours():
    bits = np.random.default_rng(5).integers(0, 2, (20, 20)).astype(bool)
    assert np.array_equal(decode_image(encoded(Image.fromarray(bits))), np.repeat(bits[..., None] * 255, 3, axis=2))
    colours = np.random.default_rng(6).integers(0, 256, (8, 3), dtype=np.uint8)
    places = np.random.default_rng(7).integers(0, 8, (20, 20), dtype=np.uint8)
    palette = Image.fromarray(places, mode="P")
    palette.putpalette(colours.ravel().tolist())
    for image_format in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(decode_image(encoded(palette, image_format)), colours[places])
    alphas = bytes(range(0, 256, 32))
    alpha = np.frombuffer(alphas, dtype=np.uint8)[places][..., None] / 255
    expected = colours[places] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encoded(palette, transparency=alphas)) - expected).max() <= 1


def test_transparency_of_webp_and_avif_goes_over_white():
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    rgba[:, :16] = (200, 40, 40, 255)
    for image_format, options in (("WEBP", {"lossless": True}), ("AVIF", {"quality": 100})):
        if image_format in decode.FORMATS:
            found = decode_image(encoded(Image.fromarray(rgba), image_format, **options)).astype(int)
            assert np.abs(found[:, :14] - [200, 40, 40]).max() <= 4 and found[:, 18:].min() >= 251


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_of_an_animation_is_used(image_format):
    _skip_without(image_format)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 2
    assert np.abs(decode_image(content).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("image_format", ["BMP", "TIFF", "WEBP", "AVIF"])
def test_other_formats_decode_to_the_pixels_of_pillow(image_format):
    _skip_without(image_format)
    content = encoded(_photo(40, 30), image_format)
    assert np.array_equal(decode_image(content), np.asarray(Image.open(io.BytesIO(content))))


def _skip_without(image_format: str) -> None:
    if image_format not in decode.FORMATS:
        pytest.skip(f"this Pillow has no {image_format}")


def _png_header_of(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT" + bytes(14)


def test_unusable_pictures_are_refused_with_their_reason():
    jpeg, png = encoded(_photo(64, 64), "JPEG"), encoded(_photo(64, 64))
    cases = {
        "empty_image": [b""],
        "unknown_format": [b"<html>", b"<svg width='9' height='9'/>", b"%!PS-Adobe EPSF", b"8BPS\0\1" + bytes(50)],
        "undecodable": [jpeg[: len(jpeg) // 2], png[: len(png) // 2], jpeg[:300] + jpeg[400:]],
        "too_many_pixels": [_png_header_of(9000, 9000), _png_header_of(25_000, 25_000)],
        "too_small": [encoded(Image.new("RGB", (1, 1))), encoded(Image.new("RGB", (15, 90)), "JPEG")],
        "too_narrow": [encoded(Image.new("RGB", (16, 321)))],
    }  # fmt: skip
    for reason, contents in cases.items():
        for content in contents:
            with pytest.raises(BadSampleError) as caught:
                decode_image(content)
            assert caught.value.reason == reason


def test_a_picture_cut_in_half_is_refused_in_every_format():
    # A GIF may end early and still be whole to its decoder.
    for image_format in {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"} & set(decode.FORMATS):
        content = encoded(_photo(64, 64), image_format)
        with pytest.raises(BadSampleError) as caught:
            decode_image(content[: len(content) // 2])
        assert caught.value.reason in ("undecodable", "unknown_format"), image_format


def test_a_bomb_is_refused_by_its_header_within_50_ms():
    jpeg = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 12_000, 12_000)
    gif = encoded(Image.new("RGB", (64, 64)), "GIF")
    gif = gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:]
    for content in (bytes(jpeg), gif, _png_header_of(12_000, 12_000), _bomb()):
        seconds = []
        for _ in range(3):  # the least of three: others use this machine too
            start = time.perf_counter()
            with pytest.raises(BadSampleError, match="too_many_pixels"):
                decode_image(content)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05


def test_a_jpeg_of_many_passes_is_refused_wherever_pictures_are_opened_for_training_or_not():
    content = encoded(Image.new("RGB", (64, 64), "teal"), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    decode.open_image(content[:-2] + last_scan * 50 + content[-2:])
    for open_it in (decode_image, decode.open_image):
        with pytest.raises(BadSampleError, match="too_many_scans"):
            open_it(content[:-2] + last_scan * 100 + content[-2:])


def _bomb() -> bytes:
    """A whole PNG of 144 million pixels in 20 KB."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 1500)) for _ in range(12_000)) + rows.flush()
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0), b"IDAT" + data, b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_64_million_pixels_are_accepted_and_one_row_more_is_not():
    decode.check_pixels(8000, 8000)
    with pytest.raises(BadSampleError, match="too_many_pixels"):
        decode.check_pixels(8000, 8001)
    decode.check_shape(16, 320)
    for reason, size in {"too_small": (15, 15), "too_narrow": (321, 16)}.items():
        with pytest.raises(BadSampleError, match=reason):
            decode.check_shape(*size)


def _originals() -> list[bytes]:
    """Small pictures in every format and mode that decodes on a path of its own."""
    photo = _photo(40, 30)
    rgba = photo.convert("RGBA")
    rgba.putalpha(photo.convert("L"))
    grey = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    found = [encoded(photo, "JPEG", **o) for o in ({}, {"progressive": True}, {"subsampling": 0, "exif": _rotated()})]
    found += [encoded(photo.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    found += [encoded(image, "PNG") for image in (photo, rgba, grey, photo.quantize(16))]
    found += [encoded(photo, "WEBP", save_all=True, append_images=[photo.rotate(180)]), encoded(rgba, "WEBP")]
    found += [encoded(photo, image_format) for image_format in ("GIF", "BMP", "TIFF")]
    found += [encoded(photo, "TIFF", compression="tiff_lzw"), encoded(grey, "TIFF")]
    return found + ([encoded(photo, "AVIF")] if "AVIF" in decode.FORMATS else [])


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _check_mutations(count: int) -> None:
    rng, originals, longest = np.random.default_rng(0), _originals(), 0.0
    transform, out = TrainTransform(image_size=8, decode_floor=1.0), np.empty((8, 8, 3), dtype=np.uint8)
    refused = 0
    for i in range(count):
        content = bytearray(originals[i % len(originals)])
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            content[place] = rng.integers(256)
        mutated = bytes(content[: rng.integers(1, len(content) + 1)]) if i % 3 == 0 else bytes(content)
        start = time.perf_counter()
        try:
            decoded = decode_image(mutated)
            transform(mutated, uniforms=[0.5] * 64, out=out)
        except BadSampleError:
            refused += 1
            continue
        finally:
            longest = max(longest, time.perf_counter() - start)
        assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3
    assert 0.1 * count < refused < 0.95 * count
    assert longest < 10


def test_damaged_pictures_decode_or_are_refused_and_nothing_else():
    _check_mutations(600)


@pytest.mark.slow
def test_twenty_thousand_damaged_pictures_decode_or_are_refused():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _check_mutations(20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
