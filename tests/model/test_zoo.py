import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from clip_train.config_dir import config_dir
from clip_train.errors import UserError
from clip_train.model.clip import CLIP
from clip_train.model.config import ModelConfig
from clip_train.model.zoo import available_models, create_model, model_config

# Published integers: total parameters, image tower, text tower, tensors in the state dict.
ZOO = {
    "RN50": (102_007_137, 38_316_896, 63_690_240, 489),
    "RN101": (119_688_033, 56_259_936, 63_428_096, 795),
    "RN50x4": (178_300_601, 87_137_080, 91_163_520, 669),
    "RN50x16": (290_979_217, 167_328_912, 123_650_304, 921),
    "RN50x64": (623_258_305, 420_380_352, 202_877_952, 1353),
    "tiny-rn": (7_081_949, 342_876, 6_739_072, 153),
    "ViT-S-32-alt": (43_224_449, 22_592_640, 20_631_808, 278),
    "ViT-S-32": (63_085_825, 22_641_792, 40_444_032, 302),
    "ViT-S-16-alt": (42_396_161, 21_764_352, 20_631_808, 278),
    "ViT-S-16": (62_257_537, 21_813_504, 40_444_032, 302),
    "ViT-M-32-alt": (80_070_273, 39_626_240, 40_444_032, 302),
    "ViT-M-32": (103_119_873, 39_691_776, 63_428_096, 302),
    "ViT-M-16-alt": (78_978_177, 38_534_144, 40_444_032, 326),
    "ViT-M-16": (102_015_489, 38_587_392, 63_428_096, 302),
    "ViT-B-32": (151_277_313, 87_849_216, 63_428_096, 302),
    "ViT-B-32-256": (151_288_833, 87_860_736, 63_428_096, 302),
    "ViT-B-16": (149_620_737, 86_192_640, 63_428_096, 302),
    "ViT-L-14": (427_616_513, 303_966_208, 123_650_304, 446),
    "ViT-L-14-336": (427_944_193, 304_293_888, 123_650_304, 446),
    "ViT-H-14": (986_109_441, 632_076_800, 354_032_640, 686),
    "ViT-g-14": (1_366_678_273, 1_012_645_632, 354_032_640, 782),
    "ViT-bigG-14": (2_539_567_105, 1_844_907_264, 694_659_840, 974),
    "ViT-B-16-SigLIP": (203_155_970, 92_884_224, 110_271_744, 314),
    "ViT-L-16-SigLIP-256": (652_150_786, 315_956_224, 336_194_560, 602),
    "tiny": (7_244_929, 505_856, 6_739_072, 62),
}


@pytest.mark.parametrize("name", ZOO)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = CLIP(model_config(name))
    total = sum(p.numel() for p in model.parameters())
    image = sum(p.numel() for p in model.visual.parameters())
    scalars = 1 if model.logit_bias is None else 2
    assert (total, image, total - image - scalars, len(model.state_dict())) == ZOO[name]


def test_every_published_row_of_clips_own_towers_has_a_quickgelu_twin_that_differs_in_the_activation_only():
    for name in ZOO:
        if name.startswith("tiny") or "SigLIP" in name:
            continue
        plain, twin = model_config(name), model_config(f"{name}-quickgelu")
        assert twin.quick_gelu and not plain.quick_gelu
        assert replace(twin, name=name, quick_gelu=False) == plain


def test_every_row_builds_and_carries_its_file_name():
    rows = {path.stem for path in (config_dir() / "model").glob("*.yaml")}
    assert rows == {name for name in available_models() if "/" not in name}
    for name in rows:
        assert model_config(name).name == name


def test_openais_nine_names_come_first_in_its_order_and_a_slash_means_quickgelu():
    names = available_models()
    assert names[:5] == ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
    assert names[5:9] == ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
    assert len(set(names)) == len(names)
    for name in names[5:9]:
        assert model_config(name).quick_gelu
    assert not model_config("ViT-B-32").quick_gelu
    assert model_config("ViT-L/14@336px").vision.image_size == 336


def test_an_unknown_name_is_answered_with_the_three_nearest():
    with pytest.raises(UserError, match="'VIT-B32'; the nearest names are ViT-B/32, ViT-B-32, ViT-S-32"):
        create_model("VIT-B32")


def test_overrides_replace_fields_and_are_checked():
    model = create_model("tiny", embed_dim=32, text={"context_length": 16})
    assert model.text_projection.shape == (128, 32) and model.context_length == 16
    with pytest.raises(UserError, match="contxt"):
        create_model("tiny", text={"contxt": 16})
    with pytest.raises(UserError, match=r"model.vision.width=130 must be a multiple of model.vision.heads=4"):
        create_model("tiny", vision={"width": 130, "heads": 4})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision": {"image_size": 65}}, "multiple of model.vision.patch_size=16"),
        ({"vision": {"layers": 0}}, "model.vision.layers=0 must be positive"),
        ({"vision": {"mlp_ratio": 0}}, "model.vision.mlp_ratio"),
        ({"text": {"context_length": 2}}, "model.text.context_length=2"),
        ({"embed_dim": 0}, "model.embed_dim=0"),
        ({"std": [1.0, 1.0]}, "three values"),
        ({"patch_dropout": 1.0}, r"model.patch_dropout=1.0 must lie in \[0, 1\)"),
        ({"checkpointing": -1}, "model.checkpointing=-1"),
        ({"ragged": "packd"}, "packd"),
        ({"vision": {"resnet_stages": [1, 2]}}, "four positive numbers"),
        ({"vision": {"resnet_stages": [1, 1, 1, 1], "image_size": 80}}, "multiple of 32"),
        ({"vision": {"resnet_stages": [1, 1, 1, 1], "heads": 3}}, "divide 32 times the width"),
        ({"vision": {"resnet_stages": [1, 1, 1, 1]}, "patch_dropout": 0.5}, "needs a vision transformer"),
    ],
)
def test_impossible_values_are_refused_by_name(overrides, message):
    with pytest.raises(UserError, match=message):
        model_config("tiny", **overrides)


def test_the_config_survives_yaml():
    config = model_config("ViT-g-14")
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(text)))
    assert again == config


def test_reading_a_row_does_not_import_torch():
    code = "import sys; from clip_train.model.zoo import *; model_config('tiny'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
