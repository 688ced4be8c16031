"""Catalogue of bad input, items 68 to 75: evaluation sets and what a model makes of them."""

import json

import pytest
import torch

from clip_train.model.clip import CLIP
from tests.catalogue import commands
from tests.catalogue.commands import clip_train
from tests.data.made import encoded, picture, write_shard

catalogue = pytest.mark.catalogue
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory):
    """A run whose pixels are normalised in a way of its own, evaluated on `val` at its end."""
    folder = tmp_path_factory.mktemp("run")
    done = commands.train(
        shards / "train", folder / "run", f"data.val={shards}/val", "evaluation=[val]",
        "model.mean=[0.1,0.2,0.3]", "model.std=[0.9,0.8,0.7]",
    )  # fmt: skip
    done.worked()
    return folder / "run"


@pytest.fixture
def evaluate(run_dir, tmp_path):
    return lambda *arguments: clip_train(
        "evaluate", f"checkpoint={run_dir}", "device=cpu", f"output={tmp_path}/out", *arguments
    )


def labelled(root, labels, names, *, templates="a photo of a {c}.\n"):
    samples = [
        {"__key__": f"s{i:05d}", "png": encoded(picture(i)), "cls": str(label).encode()}
        for i, label in enumerate(labels)
    ]
    write_shard(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text(templates)
    return ("evaluation=[classify]", f"evaluation.classify.root={root}")


@catalogue(68)
def test_another_number_of_names_than_classes_shows_both(evaluate, tmp_path):
    for name in ("x", "y"):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        (tmp_path / "set" / "test" / name / "1.png").write_bytes(encoded(picture(1)))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    done = evaluate(
        "evaluation=[classify]", f"evaluation.classify.root={tmp_path}/set",
        f"evaluation.classify.classnames={tmp_path}/names.txt",
    )  # fmt: skip
    done.refused(2, tmp_path / "set", "2 class folders", "3 class names")


@catalogue(69)
@pytest.mark.parametrize("label", [2, -1, "x", ""])
def test_a_label_out_of_range_is_damage_and_names_the_sample(evaluate, tmp_path, label):
    evaluate(*labelled(tmp_path / "set", [0, 1, label], ["a", "b"])).refused(3, "s00002", ".cls", "[0, 2)")


@catalogue(70)
@pytest.mark.parametrize(
    ("names", "templates", "parts"),
    [
        (["a", "", "c"], "{c}\n", ["classnames.txt", "line 2 is empty"]),
        (["", "b"], "{c}\n", ["classnames.txt", "line 1 is empty"]),
        (["a", "b"], "\n", ["templates.txt", "is empty"]),
        (["a", "b"], "a photo\n", ["templates.txt", "'a photo' must contain"]),
    ],
)
def test_an_empty_name_or_template_is_refused_with_its_line(evaluate, tmp_path, names, templates, parts):
    evaluate(*labelled(tmp_path / "set", [0, 1], names, templates=templates)).refused(2, *parts)


@catalogue(71)
def test_any_number_of_captions_belongs_to_its_picture_and_none_is_named(evaluate, tmp_path):
    def pairs(folder, captions):
        samples = [
            {"__key__": f"k{i}", "png": encoded(picture(i)), "txt": "\n".join(texts).encode()}
            for i, texts in enumerate(captions)
        ]
        write_shard(tmp_path / folder / "0.tar", samples)
        return evaluate("evaluation=[retrieve]", f"evaluation.retrieve.shards={tmp_path}/{folder}")

    pairs("uneven", [["a"], ["b", "c", "d"], ["e", "f"]]).worked("retrieve")
    assert json.loads((tmp_path / "out" / "retrieve.json").read_text())["clip_train"]["n"] == 3
    pairs("without", [["a"], [], ["b"]]).refused(3, "0.tar/k1", "no caption")


@catalogue(72)
@pytest.mark.parametrize("count", [1, 3])
def test_a_set_smaller_than_a_batch_is_scored_exactly(evaluate, tmp_path, count):
    evaluate(*labelled(tmp_path / "set", [0] * count, ["a", "b"])).worked("classify")
    assert json.loads((tmp_path / "out" / "classify.json").read_text())["clip_train"]["n"] == count


@catalogue(73)
def test_a_model_without_bias_or_temperature_is_evaluated(run_dir, evaluate, tmp_path, shards):
    assert not [name for name in _state(run_dir) if name == "logit_bias"]
    evaluate("evaluation=[retrieve]", f"evaluation.retrieve.shards={shards}/val").worked("retrieve")
    with_scale = (tmp_path / "out" / "retrieve.json").read_text()
    weights = {name: tensor for name, tensor in _state(run_dir).items() if name != "logit_scale"}
    clip_train("export", run_dir, "--to", "folder", "--out", tmp_path / "export").worked()
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "export" / "open_clip_model.safetensors")
    done = clip_train(
        "evaluate", f"checkpoint={tmp_path}/export", "device=cpu", f"output={tmp_path}/bare", "evaluation=[retrieve]",
        f"evaluation.retrieve.shards={shards}/val",
    )  # fmt: skip
    done.worked("no logit_scale")
    assert _metrics((tmp_path / "bare" / "retrieve.json").read_text()) == _metrics(with_scale)


def _state(run_dir):
    from safetensors.torch import load_file

    return load_file(run_dir / "checkpoints" / "step-00000004" / "model.safetensors")


def _metrics(text):
    """Scores, or for four steps of training more likely the mean cosine that says why there are none."""
    result = json.loads(text)
    return result["metrics"], result["clip_train"]["reason"]


@catalogue(74)
@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_features_that_are_not_finite_are_damage(monkeypatch, evaluate, tmp_path, tower):
    def healthy(self, inputs, **_):
        return torch.nn.functional.normalize(torch.randn(len(inputs), self.config.embed_dim), dim=1)

    def broken(self, inputs, **_):
        return torch.where(torch.arange(len(inputs))[:, None] == 1, torch.nan, healthy(self, inputs))

    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(CLIP, name, broken if name == tower else healthy)
    done = evaluate(*labelled(tmp_path / "set", [0, 1, 2], ["a", "b", "c"]))
    done.refused(3, "classify", "not finite", "the first is number 2")


@catalogue(75)
def test_pixels_are_normalised_as_the_checkpoint_was_trained(run_dir, evaluate, tmp_path, shards):
    evaluate("evaluation=[retrieve]", f"evaluation.retrieve.shards={shards}/val").worked()
    trained = (run_dir / "evaluation" / "step-00000004" / "val.json").read_text()
    assert _metrics((tmp_path / "out" / "retrieve.json").read_text()) == _metrics(trained)
