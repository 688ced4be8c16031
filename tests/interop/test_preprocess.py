import pickle

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from clip_train.interop.pictures import Preprocess
from clip_train.model.zoo import model_config


def test_preprocess_is_pixel_equal_to_openais_transform():
    config = model_config("tiny")
    reference = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    preprocess = pickle.loads(pickle.dumps(Preprocess(config)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(10, 300, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert torch.equal(preprocess(image), reference(image)), (height, width)
    grey = Image.fromarray(rng.integers(0, 256, (80, 90), dtype=np.uint8))
    assert torch.equal(preprocess(grey), reference(grey.convert("RGB")))


def test_a_squashed_picture_is_pixel_equal_to_open_clips_transform():
    reference = transforms.Compose(
        [
            transforms.Resize((64, 64), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    preprocess = Preprocess(model_config("tiny", squash=True, mean=[0.5] * 3, std=[0.5] * 3))
    rng = np.random.default_rng(0)
    for height, width in [(64, 64), (64, 90), (50, 64), *rng.integers(10, 300, (20, 2)).tolist()]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert torch.equal(preprocess(image), reference(image)), (height, width)
