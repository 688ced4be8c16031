"""Training geometry against Pillow and torchvision: crops, resizing, scaled decoding, preprocessing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

from clip_train.data.images import decode
from clip_train.data.images.transforms import (
    TrainTransform,
    preprocess_pixels,
    random_crop,
    resize_into,
    sample_uniforms,
    scaled_crop,
)
from scripts.photographs import photograph, pillow_row, psnr
from tests.data.made import encoded, picture


def _row(content: bytes, *, slot: int, size: int, **options) -> np.ndarray:
    out = np.empty((size, size, 3), dtype=np.uint8)
    TrainTransform(image_size=size, **options)(content, uniforms=sample_uniforms(0, slot), out=out)
    return out


def _decibels(content: bytes, *, slot: int, size: int, **options) -> float:
    transform = TrainTransform(image_size=size, **options)
    reference = pillow_row(content, transform=transform, uniforms=sample_uniforms(0, slot))
    return psnr(_row(content, slot=slot, size=size, **options), reference)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (300, 451), (512, 512), (640, 480), (1024, 1024)])
def test_exact_rows_agree_with_pillow_to_65_db_and_to_70_on_average(width, height):
    found = []
    for slot, quality in enumerate((75, 90, 95)):
        content = encoded(photograph(width, height, seed=slot), "JPEG", quality=quality)
        found.append(_decibels(content, slot=slot, size=224))
    assert min(found) >= 65 and np.mean(found) >= 70


@pytest.mark.parametrize(("floor", "decibel"), [(1.0, 37), (2.0, 48)])
@pytest.mark.parametrize(("width", "height"), [(400, 512), (513, 511), (1000, 800), (1024, 1024)])
def test_fast_rows_stay_near_pillow_at_each_floor(width, height, floor, decibel):
    for slot in range(2):
        content = encoded(photograph(width, height, seed=slot), "JPEG", quality=90)
        assert _decibels(content, slot=slot, size=96, decode_floor=floor) >= decibel


def test_scaled_decoding_never_falls_below_the_floor_and_is_used_as_soon_as_it_may(monkeypatch):
    used = {}
    decoded = decode.PlainJpeg.decode

    def recorded(self, *, factor=1):
        used["factor"] = factor
        return decoded(self, factor=factor)

    monkeypatch.setattr(decode.PlainJpeg, "decode", recorded)
    whole = {"crop_scale": (1.0, 1.0)}
    for side, floor, factor in [
        (127, 1.0, 1), (128, 1.0, 2), (255, 1.0, 2), (256, 1.0, 4), (512, 1.0, 8), (1024, 1.0, 8), (255, 2.0, 1),
        (256, 2.0, 2), (192, 1.5, 2), (190, 1.5, 1), (1024, None, 1),
    ]:  # fmt: skip
        content = encoded(Image.new("RGB", (side, side)), "JPEG")
        _row(content, slot=0, size=64, decode_floor=floor, **whole)
        crop = random_crop(side, side, uniforms=sample_uniforms(0, 0), scale=(1.0, 1.0))
        assert crop == (0, 0, side, side)
        assert used["factor"] == factor, (side, floor)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_picture_has_the_means_of_its_blocks_and_stands_upright(factor, orientation):
    """Scaling inside the inverse transform is the mean over blocks, up to the frequencies between."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph(96, 64, seed=orientation).resize((384, 256), Image.Resampling.BICUBIC)
    content = encoded(image, "JPEG", quality=95, subsampling=0, exif=exif)
    whole = decode.decode_image(content).astype(np.float64)
    jpeg = decode.open_plain_jpeg(content)
    assert (jpeg.height, jpeg.width) == whole.shape[:2] == ((384, 256) if orientation >= 5 else (256, 384))
    means = whole.reshape(jpeg.height // factor, factor, jpeg.width // factor, factor, 3).mean(axis=(1, 3))
    assert np.abs(jpeg.decode(factor=factor) - means).mean() < 3
    assert jpeg.decode(factor=factor).flags.c_contiguous


def test_the_crop_of_a_reduced_picture_lies_inside_it_and_moves_by_less_than_a_pixel():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(16, 300, (300, 2)).tolist():
        crop = random_crop(height, width, uniforms=rng.random(64).tolist(), scale=(0.1, 1.0))
        for factor in (1, 2, 4, 8):
            top, left, h, w = scaled_crop(crop, factor=factor)
            assert 0 <= top <= top + h <= height // factor and 0 <= left <= left + w <= width // factor
            edges = [crop.top, crop.left, crop.top + crop.height, crop.left + crop.width]
            moved = np.array(edges) - np.array([top, left, top + h, left + w]) * factor
            assert 0 <= moved.min() <= moved.max() < factor


def test_a_crop_of_the_models_size_is_copied():
    image = picture(3, size=(32, 32))
    assert np.array_equal(_row(encoded(image), slot=0, size=32, crop_scale=(1.0, 1.0)), np.asarray(image))


def test_resizing_agrees_with_pillow_to_more_than_65_db():
    for seed, (width, height) in enumerate([(256, 256), (512, 400), (640, 1000), (70, 60), (64, 64)]):
        image = photograph(width, height, seed=seed)
        out = np.empty((64, 64, 3), dtype=np.uint8)
        resize_into(np.asarray(image).copy(), out=out)
        reference = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
        assert psnr(out, reference) > 65


def test_resizing_writes_what_torch_interpolate_returns():
    image = torch.from_numpy(np.asarray(photograph(90, 70)).copy())
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
    image = photograph(*size)
    reference = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    assert np.array_equal(preprocess_pixels(image, image_size=32), np.asarray(reference))


def test_preprocessing_does_not_apply_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, rotated = (Image.open(io.BytesIO(encoded(photograph(60, 40), exif=e))) for e in (Image.Exif(), exif))
    assert np.array_equal(preprocess_pixels(rotated, image_size=32), preprocess_pixels(plain, image_size=32))
