"""Decoding against Pillow and against arithmetic."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_train.data.decode import BadSampleError, decode_image, jpeg_header
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


def test_grey_and_cmyk_jpegs_decode_to_the_pixels_of_pillow():
    for mode in ("L", "CMYK"):
        content = encoded(_photo(40, 30).convert(mode), "JPEG")
        assert np.array_equal(decode_image(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(_photo(48, 32), image_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode_image(content), np.asarray(expected))
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


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(image_format):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(content).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("image_format", ["BMP", "TIFF", "WEBP"])
def test_other_formats_decode_to_the_pixels_of_pillow(image_format):
    content = encoded(_photo(40, 30), image_format)
    assert np.array_equal(decode_image(content), np.asarray(Image.open(io.BytesIO(content))))


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


def _check_mutations(count: int) -> None:
    rng = np.random.default_rng(0)
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    originals = [encoded(_photo(40, 30), f) for f in formats]
    for i in range(count):
        content = bytearray(originals[i % len(originals)])
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            content[place] = rng.integers(256)
        try:
            decoded = decode_image(bytes(content[: rng.integers(1, len(content) + 1)]) if i % 3 else bytes(content))
        except BadSampleError:
            continue
        assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3


def test_damaged_pictures_decode_or_are_refused_and_nothing_else():
    _check_mutations(600)


@pytest.mark.slow
def test_twenty_thousand_damaged_pictures_decode_or_are_refused():
    _check_mutations(20_000)
