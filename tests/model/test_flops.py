import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_train.model.flops import image_flops, text_flops
from clip_train.model.zoo import create_model, model_config
from tests.model import reference
from tests.model.test_zoo import ZOO

# Published GFLOPs of one image and one caption of 77 tokens, attention matrices included.
GFLOPS = {
    "RN50": (12.22, 5.96),
    "RN101": (19.54, 5.96),
    "RN50x4": (42.56, 9.27),
    "RN50x16": (149.39, 13.30),
    "RN50x64": (529.11, 23.55),
    "ViT-S-32-alt": (2.29, 1.27),
    "ViT-S-32": (2.29, 3.38),
    "ViT-S-16-alt": (9.20, 1.27),
    "ViT-S-16": (9.20, 3.38),
    "ViT-M-32-alt": (3.99, 3.38),
    "ViT-M-32": (3.99, 5.96),
    "ViT-M-16-alt": (15.98, 3.38),
    "ViT-M-16": (15.98, 5.96),
    "ViT-B-32": (8.82, 5.96),
    "ViT-B-32-256": (11.50, 5.96),
    "ViT-B-16": (35.13, 5.96),
    "ViT-L-14": (162.03, 13.30),
    "ViT-L-14-336": (381.92, 13.30),
    "ViT-H-14": (334.59, 47.09),
    "ViT-g-14": (534.06, 47.09),
    "ViT-bigG-14": (967.50, 97.86),
    "ViT-B-16-SigLIP": (35.42, 11.02),
    "ViT-L-16-SigLIP-256": (162.56, 39.06),
    "tiny": (0.0168, 0.0666),
    "tiny-rn": (0.0094, 0.0666),
}


@pytest.mark.parametrize("name", ZOO)
def test_flops_at_full_length_are_the_published_ones(name):
    config = model_config(name)
    counted = image_flops(config) / 1e9, text_flops(config, lengths=[config.text.context_length]) / 1e9
    digits = 4 if name.startswith("tiny") else 2
    assert tuple(round(value, digits) for value in counted) == GFLOPS[name]


def test_flops_of_captions_are_those_that_torch_counts_at_their_own_lengths():
    config = model_config("tiny")
    weights = create_model("tiny", seed=0).state_dict()
    lengths = [2, 9, 77, 30]
    total = 0
    for length in lengths:
        tokens = reference.random_captions([length], context_length=length)
        own = {**weights, "positional_embedding": weights["positional_embedding"][:length]}
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            reference.encode_text({k: v.requires_grad_() for k, v in own.items()}, tokens, heads=2)
        total += counter.get_total_flops()
    assert text_flops(config, lengths=lengths) == total


def test_flops_of_images_in_training_leave_dropped_patches_out():
    config = model_config("ViT-B-16", patch_dropout=0.5)
    assert image_flops(config) == image_flops(model_config("ViT-B-16"))
    assert image_flops(config, training=True) == pytest.approx(17.4e9, rel=1e-2)
