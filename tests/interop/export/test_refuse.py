"""Every property that some library lacks gives exactly "ok" or a refusal, library by library."""

import pytest

from clip_train.errors import UserError
from clip_train.interop.export.refuse import refusals
from clip_train.interop.export.targets import Target
from clip_train.model.zoo import create_model, model_config
from clip_train.tokenizer.huggingface import HuggingFaceTokenizer
from tests.tokenizer.made import write_bpe

# Fits everything: 64-wide heads, QuickGELU, a ViT with square pictures and CLIP's vocabulary.
EVERYWHERE = {
    "quick_gelu": True,
    "vision": {"image_size": 32, "patch_size": 16, "width": 128, "heads": 2, "layers": 1},
    "text": {"width": 64, "heads": 1, "layers": 1},
}
COLUMNS = (Target.open_clip, Target.transformers, Target.openai_clip, Target.onnxruntime)
OK = "ok ok ok ok"
TABLE = [
    ("nothing unusual", {}, OK),
    ("GELU", {"quick_gelu": False}, "ok ok REFUSED ok"),
    ("image heads not 64 wide", {"vision": {"heads": 4}}, "ok ok REFUSED ok"),
    ("text heads not 64 wide", {"text": {"heads": 2}}, "ok ok REFUSED ok"),
    ("MLP ratio not 4", {"vision": {"mlp_ratio": 4.3637}}, "ok ok REFUSED ok"),
    ("ResNet", {"vision": {"resnet_stages": [1, 1, 1, 1], "width": 8, "heads": 4}}, "ok REFUSED ok ok"),
    ("LayerScale", {"vision": {"layer_scale": 1e-4}}, "ok REFUSED REFUSED ok"),
    ("logit bias", {"init_logit_bias": -10.0}, "ok REFUSED REFUSED ok"),
    ("timm tower", {"vision": {"image_size": 160, "timm": "test_vit"}}, "ok REFUSED REFUSED ok"),
    ("text that sees what follows", {"text": {"causal": False}}, "ok REFUSED REFUSED ok"),
    ("text read at the last token", {"text": {"pool": "last"}}, "ok REFUSED REFUSED ok"),
    ("text projection with a bias", {"text": {"proj_bias": True}}, "ok REFUSED REFUSED ok"),
    ("other norms", {"text": {"norm_eps": 1e-6}}, "ok REFUSED REFUSED ok"),
    ("GELU by tanh", {"text": {"gelu_tanh": True}}, "ok REFUSED REFUSED ok"),
    ("text MLP ratio not 4", {"text": {"mlp_ratio": 3.0}}, "ok ok REFUSED ok"),
    ("another end id", {"text": {"end_id": 7}}, "ok ok REFUSED ok"),
    (
        "what open_clip has no key for",
        {"vision": {"image_size": 160, "timm": "test_vit", "timm_act": "gelu_tanh"}},
        "REFUSED REFUSED REFUSED ok",
    ),
    ("context other than 77", {"text": {"context_length": 32}}, OK),
]


def merged(changes):
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in EVERYWHERE.items()}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return values


def refused_by(changes, **options):
    return refusals(model_config("tiny", **merged(changes)), {}, **options)


@pytest.mark.parametrize(("what", "changes", "cells"), TABLE, ids=[row[0] for row in TABLE])
def test_each_cell_is_ok_or_refused(what, changes, cells):
    found = refused_by(changes)
    assert " ".join("REFUSED" if target in found else "ok" for target in COLUMNS) == cells
    # The two others read another library's files.
    assert (Target.sentence_transformers in found) == (Target.transformers in found)
    assert (Target.clip_benchmark in found) == (Target.open_clip in found)


def test_reasons_name_the_property_and_what_the_library_assumes():
    found = refused_by({"vision": {"heads": 4}, "quick_gelu": False})
    assert found[Target.openai_clip] == [
        "the activation is GELU, clip.load assumes QuickGELU",
        "image heads are 32 wide, clip.load assumes 64",
    ]


@pytest.mark.parametrize(
    ("eos", "cells"), [("</s>", "ok ok REFUSED ok"), ("<unk>", "ok REFUSED REFUSED ok")], ids=["end id 3", "end id 2"]
)
def test_another_vocabulary_goes_wherever_its_tokenizer_can(eos, cells, tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json")
    tokenizer = HuggingFaceTokenizer(
        path.read_text(), origin="x", context_length=16, bos="<s>", eos=eos, pad="<pad>", cleaning="clip"
    )
    text = {"vocab_size": tokenizer.vocab_size, "end_id": tokenizer.end_id, "context_length": 16}
    found = refused_by({"text": text}, tokenizer=tokenizer)
    assert " ".join("REFUSED" if target in found else "ok" for target in COLUMNS) == cells


def test_another_vocabulary_without_its_tokenizer_is_for_graphs_only():
    assert set(refused_by({"text": {"vocab_size": 350}})) == set(Target) - {Target.onnxruntime}


def test_a_bias_may_be_dropped_on_request():
    assert not refused_by({"init_logit_bias": -10.0}, drop_logit_bias=True)


def test_weights_beyond_half_precision_are_refused_only_where_they_would_be_rounded():
    model = create_model("tiny", **EVERYWHERE)
    tensors = model.state_dict()
    tensors["token_embedding.weight"][0, 0] = 1e5
    assert not refusals(model.config, tensors)
    tensors["visual.conv1.weight"][0, 0, 0, 0] = -1e5
    found = refusals(model.config, tensors)
    assert set(found) == {Target.openai_clip}
    assert "visual.conv1.weight reaches 1e+05" in found[Target.openai_clip][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_value_that_is_not_finite_is_not_exported(value):
    model = create_model("tiny", **EVERYWHERE)
    tensors = model.state_dict()
    tensors["ln_final.bias"][3] = value
    with pytest.raises(UserError, match=r"ln_final\.bias"):
        refusals(model.config, tensors)
