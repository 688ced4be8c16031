"""Against open_clip's own modules, where they are installed (extra `bench`)."""

import pytest
import torch

from clip_train.model.zoo import create_model

from . import reference

open_clip = pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
TINY_RN = {**TINY, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}


def pair(name, quick_gelu):
    torch.manual_seed(0)
    if name.startswith("tiny"):
        theirs = open_clip.model.CLIP(**(TINY if name == "tiny" else TINY_RN), quick_gelu=quick_gelu)
    else:
        theirs = open_clip.create_model(name + ("-quickgelu" if quick_gelu else ""))
    return theirs.eval(), create_model(name, quick_gelu=quick_gelu, seed=7).eval()


@pytest.mark.parametrize(
    ("name", "quick_gelu"),
    [
        ("tiny", False),
        ("tiny", True),
        ("tiny-rn", True),
        pytest.param("ViT-B-32", True, marks=pytest.mark.slow),
        pytest.param("ViT-M-16-alt", False, marks=pytest.mark.slow),
        pytest.param("RN50", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_features_agree_on_the_same_weights(name, quick_gelu, direction):
    theirs, ours = pair(name, quick_gelu)
    source, target = (theirs, ours) if direction == "import" else (ours, theirs)
    weights = source.state_dict()
    if direction == "import":
        # Spread biases and gains, which start at 0 and 1, so that a swapped one shows.
        weights = {k: v + 0.02 * torch.rand_like(v) if v.ndim == 1 else v for k, v in weights.items()}
        theirs.load_state_dict(weights)
    target.load_state_dict(weights, strict=True)
    size = ours.visual.input_resolution
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
    tokens = reference.random_captions([5, 20, 77])
    with torch.no_grad():
        image = theirs.encode_image(reference.normalized(pixels).float(), normalize=True)
        text = theirs.encode_text(tokens, normalize=True)
        assert (ours.encode_image(pixels) - image).abs().max() < 1e-5
        assert (ours.encode_text(tokens) - text).abs().max() < 1e-5
