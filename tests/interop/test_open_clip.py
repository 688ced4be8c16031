"""Files that open_clip itself writes, where it is installed (extra `bench`)."""

import json

import pytest
import torch
from PIL import Image

import clip_train

open_clip = pytest.importorskip("open_clip")

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


def test_a_folder_saved_by_open_clip_gives_the_same_features(tmp_path):
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**CONFIG).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours, preprocess = clip_train.load(tmp_path, device="cpu")
    transform = open_clip.image_transform(64, is_train=False)
    picture = Image.effect_noise((120, 90), 80).convert("RGB")
    assert torch.equal(preprocess(picture), transform(picture))
    texts = ["a photo of a cat", "naïve café ☕"]
    with torch.no_grad():
        image = theirs.encode_image(transform(picture)[None], normalize=True)
        text = theirs.encode_text(open_clip.SimpleTokenizer()(texts), normalize=True)
        assert (ours.encode_image(preprocess(picture)[None]) - image).abs().max() < 1e-5
        assert (ours.encode_text(texts) - text).abs().max() < 1e-5
