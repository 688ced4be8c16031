"""`clip-train classify` against probabilities computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import clip_train
from clip_train.errors import UserError
from clip_train.tools.classify import BACKGROUND, classify, classify_command

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


class ColourModel:
    """Sees mean colours; a text is the sum of the colours it names, plus a little of everything."""

    logit_scale = torch.tensor(math.log(10.0))
    logit_bias = None

    def tokenize(self, texts):
        return torch.tensor([[text.split().count(c) for c in COLOURS] for text in texts])

    def encode_text(self, tokens):
        return torch.nn.functional.normalize(tokens.float() + 0.1, dim=-1)

    def encode_image(self, images):
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)


def preprocess(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


@pytest.fixture
def pictures(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def loadable(monkeypatch):
    monkeypatch.setattr(clip_train, "load", lambda name: (ColourModel(), preprocess), raising=False)


def by_hand(colour, labels, scale=10.0):
    image = np.array(COLOURS[colour]) / np.linalg.norm(COLOURS[colour])
    texts = np.array([[0.1 + label.split().count(c) for c in COLOURS] for label in labels])
    cosines = texts @ image / np.linalg.norm(texts, axis=1)
    weights = np.exp(scale * cosines)
    return cosines, weights / weights.sum()


def run(paths, labels, **options):
    return list(classify(paths, model=ColourModel(), preprocess=preprocess, labels=labels, **options))


def test_probabilities_and_cosines_equal_those_by_hand_best_first(pictures):
    labels = ["a blue thing", "a red thing", "red and green"]
    (result,) = run([pictures / "red.png"], labels)
    cosines, probabilities = by_hand("red", labels)
    assert [s.label for s in result.scores] == ["a red thing", "red and green", "a blue thing"]
    for score in result.scores:
        i = labels.index(score.label)
        assert score.cosine == pytest.approx(cosines[i], abs=1e-5)
        assert score.probability == pytest.approx(probabilities[i], abs=1e-5)


def test_templates_are_averaged_as_unit_vectors(pictures, tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("{}\n{} on green green\n")
    (result,) = run([pictures / "blue.png"], ["blue", "red"], templates=str(file))
    image = np.array(COLOURS["blue"]) / np.linalg.norm(COLOURS["blue"])
    parts = [np.array([0.1, 0.1, 1.1]), np.array([0.1, 2.1, 1.1])]
    vector = np.mean([p / np.linalg.norm(p) for p in parts], axis=0)
    assert result.scores[0].label == "blue"
    assert result.scores[0].cosine == pytest.approx(float(vector @ image / np.linalg.norm(vector)), abs=1e-5)


def test_a_model_with_a_bias_judges_each_label_by_itself(pictures):
    model = ColourModel()
    model.logit_bias = torch.tensor(-5.0)
    (result,) = classify([pictures / "red.png"], model=model, preprocess=preprocess, labels=["red", "blue"])
    cosines, _ = by_hand("red", ["red", "blue"])
    expected = 1 / (1 + np.exp(5 - 10 * cosines))
    assert [s.probability for s in result.scores] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise puts the bright upper half to the right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    seen = []
    list(classify([tmp_path / "x.png"], model=ColourModel(), labels=["red", "blue"],
                  preprocess=lambda image: (seen.append(np.asarray(image)), preprocess(image))[1]))  # fmt: skip
    np.testing.assert_array_equal(seen[0], np.rot90(pixels, -1))


def test_an_unreadable_picture_is_reported_the_rest_goes_on_and_the_exit_code_is_3(pictures, loadable, capsys):
    (pictures / "bad.png").write_bytes(b"no picture at all")
    code = classify_command(
        [pictures, pictures / "missing.png"], labels="red, green,blue", model="m", top=2, as_json=True
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 3
    named = {row["path"].rpartition("/")[2]: row for row in rows}
    assert named["bad.png"]["error"] == "unknown format"
    assert named["missing.png"]["error"] == "No such file or directory"
    assert [named[f"{c}.png"]["labels"][0]["label"] for c in COLOURS] == list(COLOURS)
    assert len(named["red.png"]["labels"]) == 2


def test_the_table_shows_percent_and_cosine_and_bad_files_go_to_stderr(pictures, loadable, capsys):
    code = classify_command(
        [pictures / "green.png", pictures / "none.png"], labels="red,green", model="m", top=5, as_json=False
    )
    output = capsys.readouterr()
    assert code == 3
    assert "none.png: No such file or directory" in output.err
    cosines, probabilities = by_hand("green", ["red", "green"])
    assert f"{100 * probabilities[1]:.1f} %" in output.out
    assert f"{cosines[1]:.3f}" in output.out


def test_a_single_label_is_compared_with_background_prompts(pictures, loadable, capsys):
    assert classify_command([pictures / "red.png"], labels="red", model="m", top=5, as_json=True) == 0
    output = capsys.readouterr()
    row = json.loads(output.out)
    assert {s["label"] for s in row["labels"]} == {"red", *(f"({b})" for b in BACKGROUND)}
    _, probabilities = by_hand("red", ["red", *BACKGROUND])
    assert row["labels"][0]["probability"] == pytest.approx(probabilities[0], abs=1e-5)
    assert "one label" in output.err


@pytest.mark.parametrize("options", [{"labels": " , "}, {"top": 0}, {"images": []}])
def test_mistakes_are_refused_before_the_model_is_loaded(pictures, options):
    arguments = {"images": [pictures], "labels": "a,b", "model": "m", "top": 5, "as_json": False} | options
    with pytest.raises(UserError):
        classify_command(arguments.pop("images"), **arguments)
