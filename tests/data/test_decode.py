"""Decoding against Pillow and against arithmetic, and geometry against torchvision."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

from clip_train.data.decode import BadSampleError, decode_image, jpeg_header
from clip_train.data.transforms import TrainTransform, preprocess_pixels, random_crop, resize_into, sample_uniforms
from tests.data.made import encoded, picture


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


def test_resizing_agrees_with_pillow_to_more_than_65_db():
    for seed, (width, height) in enumerate([(256, 256), (512, 400), (640, 1000), (70, 60), (64, 64)]):
        image = _photo(width, height, seed=seed)
        out = np.empty((64, 64, 3), dtype=np.uint8)
        resize_into(np.asarray(image).copy(), out=out)
        reference = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
        error = np.mean((out.astype(np.float64) - reference) ** 2)
        assert error == 0 or 10 * math.log10(255**2 / error) > 65


def test_resizing_writes_what_torch_interpolate_returns():
    image = torch.from_numpy(np.asarray(_photo(90, 70)).copy())
    out = np.empty((32, 48, 3), dtype=np.uint8)
    resize_into(image.numpy(), out=out)
    reference = torch.nn.functional.interpolate(
        image.permute(2, 0, 1)[None], size=(32, 48), mode="bicubic", antialias=True
    )
    assert np.array_equal(out, reference[0].permute(1, 2, 0).numpy())


def test_crops_have_the_distribution_of_torchvision():
    scale, size = (0.3, 1.0), (90, 120)
    ours = np.array([random_crop(*size, uniforms=sample_uniforms(0, i), scale=scale) for i in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    for column in range(4):
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert abs(np.quantile(ours[:, column], share) - np.quantile(theirs[:, column], share)) <= 3
    assert np.all(ours[:, 0] + ours[:, 2] <= size[0])
    assert np.all(ours[:, 1] + ours[:, 3] <= size[1])


def test_a_picture_too_narrow_for_any_crop_gets_the_centre_of_torchvision():
    for size in ((400, 20), (20, 400)):
        torch.manual_seed(0)
        expected = RandomResizedCrop.get_params(torch.empty(3, *size), (0.9, 1.0), (3 / 4, 4 / 3))
        assert random_crop(*size, uniforms=sample_uniforms(0, 0), scale=(0.9, 1.0)) == tuple(expected)


def test_flips_mirror_half_of_the_pictures_and_are_off_by_default():
    content = encoded(picture(0, size=(32, 32)))
    flipped = 0
    for slot in range(200):
        uniforms = [0.5] * 64
        uniforms[41] = sample_uniforms(0, slot)[41]
        plain, out = np.empty((16, 16, 3), dtype=np.uint8), np.empty((16, 16, 3), dtype=np.uint8)
        TrainTransform(image_size=16)(content, uniforms=uniforms, out=plain)
        TrainTransform(image_size=16, flip=True)(content, uniforms=uniforms, out=out)
        mirrored = np.array_equal(out, plain[:, ::-1])
        assert mirrored or np.array_equal(out, plain)
        flipped += mirrored
    assert 70 < flipped < 130


@pytest.mark.parametrize("size", [(100, 100), (101, 64), (64, 101), (300, 200), (37, 91), (32, 32), (33, 32)])
def test_preprocessing_is_pixel_equal_to_torchvision(size):
    image = _photo(*size)
    reference = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    assert np.array_equal(preprocess_pixels(image, image_size=32), np.asarray(reference))


def test_preprocessing_does_not_apply_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, rotated = (Image.open(io.BytesIO(encoded(_photo(60, 40), exif=e))) for e in (Image.Exif(), exif))
    assert np.array_equal(preprocess_pixels(rotated, image_size=32), preprocess_pixels(plain, image_size=32))
