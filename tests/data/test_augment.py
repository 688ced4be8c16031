"""Augmentations against torchvision's own classes with the same parameters."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from clip_train.data.config import DataConfig
from clip_train.data.images.augment import RANDAUGMENT_OPERATIONS, ColorJitter, RandAugment, apply_operation
from clip_train.data.images.transforms import NUM_WORDS, TrainTransform, random_crop, resize_into, sample_uniforms
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.data.made import encoded, numbered_shards, picture, stream


def _image(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(seed, size=(32, 32)))).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("name", RANDAUGMENT_OPERATIONS)
@pytest.mark.parametrize("negative", [False, True])
def test_each_operation_is_torchvisions_at_every_magnitude(name, negative):
    reference = v2.RandAugment()
    assert set(RANDAUGMENT_OPERATIONS) == set(reference._AUGMENTATION_SPACE)
    magnitudes, signed = reference._AUGMENTATION_SPACE[name]
    values = magnitudes(31, 32, 32)
    for magnitude in range(31):
        # torchvision holds magnitudes in float32; six digits name the decimal number that was meant.
        value = 0.0 if values is None else round(float(values[magnitude]), 6)
        value = -value if signed and negative else value
        expected = reference._apply_image_or_video_transform(_image(), name, value, "nearest", reference._fill)
        found = apply_operation(_image(), name, strength=magnitude / 30, negative=negative)
        same = found == expected
        if name == "Solarize":  # a pixel that equals the threshold may fall on either side
            same |= (_image() - 255 * value).abs() < 1e-3
        assert same.float().mean() > 0.999, magnitude


def test_randaugment_draws_operation_and_sign_from_the_slots_words():
    for slot in range(40):
        uniforms = sample_uniforms(3, slot)
        expected = _image(slot)
        for operation, sign in (uniforms[48:50], uniforms[50:52], uniforms[52:54]):
            name = RANDAUGMENT_OPERATIONS[int(operation * 14)]
            expected = apply_operation(expected, name, strength=0.3, negative=sign < 0.5)
        found = RandAugment(num_operations=3, magnitude=9)(_image(slot), uniforms=uniforms)
        assert torch.equal(found, expected)


def test_colour_jitter_is_torchvisions_with_the_slots_factors_in_the_slots_order():
    reference = v2.ColorJitter(0.4, 0.3, 1.2, 0.1)
    orders, small = Counter(), _image()[:, :8, :8].contiguous()
    for slot in range(30):
        u = sample_uniforms(5, slot)
        found = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.2, hue=0.1)(small, uniforms=u)
        factors = {
            "brightness_factor": 0.6 + 0.8 * u[43], "contrast_factor": 0.7 + 0.6 * u[44],
            "saturation_factor": 2.2 * u[45], "hue_factor": -0.1 + 0.2 * u[46],
        }  # fmt: skip
        equal = [
            order
            for order in itertools.permutations(range(4))
            if torch.equal(reference.transform(small, {"fn_idx": order, **factors}), found)
        ]
        assert equal
        orders[equal[0]] += 1
    assert len(orders) > 8


def test_colour_jitter_of_strength_0_changes_nothing():
    none = ColorJitter(brightness=0, contrast=0, saturation=0, hue=0)
    assert torch.equal(none(_image(), uniforms=sample_uniforms(0, 0)), _image())


def test_rows_are_cropped_then_flipped_then_augmented():
    config = DataConfig(flip=True, color_jitter=[0.4, 0.0, 0.0, 0.0], randaugment=[1, 9])
    content, image = encoded(picture(1, size=(40, 40))), np.array(picture(1, size=(40, 40)))
    flipped = 0
    for slot in range(16):
        u = sample_uniforms(0, slot)
        out, resized = np.empty((24, 24, 3), dtype=np.uint8), np.empty((24, 24, 3), dtype=np.uint8)
        config.transform(image_size=24)(content, uniforms=u, out=out)
        top, left, height, width = random_crop(40, 40, uniforms=u, scale=(0.9, 1.0))
        resize_into(image[top : top + height, left : left + width], out=resized)
        expected = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        if u[41] < 0.5:
            expected, flipped = functional.horizontal_flip(expected), flipped + 1
        name = RANDAUGMENT_OPERATIONS[int(u[48] * 14)]
        expected = apply_operation(expected, name, strength=0.3, negative=u[49] < 0.5)
        expected = functional.adjust_brightness(expected, 0.6 + 0.8 * u[43])
        assert np.array_equal(out, expected.permute(1, 2, 0).numpy())
    assert 0 < flipped < 16


def _augmented_images(folder, world: World, *, workers: int) -> torch.Tensor:
    options = {"flip": True, "color_jitter": [0.4, 0.4, 0.4, 0.1], "randaugment": [2, 9]}
    training_stream = stream(folder, world, workers=workers, **options)
    batches = list(itertools.islice(training_stream.batches(0), 3))
    training_stream.close()
    return torch.stack([batch.images for batch in batches])


def test_augmented_rows_are_the_same_at_any_number_of_ranks(tmp_path):
    numbered_shards(tmp_path, [5, 3, 8])
    alone = _augmented_images(tmp_path, World(), workers=0)
    pieces = [_augmented_images(tmp_path, World(rank=rank, size=2), workers=0) for rank in range(2)]
    assert torch.equal(alone, torch.cat(pieces, dim=1))


@pytest.mark.slow
def test_augmented_rows_are_the_same_at_any_number_of_workers(tmp_path):
    numbered_shards(tmp_path, [5, 3, 8])
    alone = _augmented_images(tmp_path, World(), workers=0)
    for workers in (1, 2):
        assert torch.equal(alone, _augmented_images(tmp_path, World(), workers=workers))


def test_no_two_uses_share_a_word():
    from clip_train.data.images import transforms

    uses = [
        [transforms.CAPTION_WORD], transforms.CROP_WORDS, [transforms.FLIP_WORD], [transforms.SUBSTITUTION_WORD],
        transforms.JITTER_WORDS, [transforms.JITTER_ORDER_WORD], transforms.RANDAUGMENT_WORDS,
    ]  # fmt: skip
    assert sorted(itertools.chain(*uses)) == list(range(NUM_WORDS))


def test_augmentations_are_off_by_default():
    assert DataConfig().transform(image_size=8) == TrainTransform(image_size=8)


@pytest.mark.parametrize(
    "options",
    [
        {"color_jitter": [0.4]}, {"color_jitter": [0.4, 0.4, 0.4, 0.6]}, {"color_jitter": [-1, 0, 0, 0]},
        {"color_jitter": [math.nan, 0, 0, 0]}, {"randaugment": [9, 9]}, {"randaugment": [2, 31]}, {"randaugment": [2]},
        {"decode_floor": 0.5, "decode": "fast"}, {"decode_floor": 2.0},
    ],
)  # fmt: skip
def test_augmentations_out_of_range_are_refused_with_their_key(options):
    with pytest.raises(UserError, match=f"data.{next(iter(options))}="):
        DataConfig(**options)
