"""Labels, probabilities and `unknown` against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.calibration import Calibration, Rejection, RejectScore, Reliability, Temperature, hash_prompts
from clip_train.errors import UserError
from clip_train.tools.classify import BACKGROUND, classify

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


class ColourModel:
    """Sees mean colours; a text is the sum of the colours it names, plus a little of everything."""

    logit_scale = torch.tensor(math.log(10.0))
    logit_bias = None
    calibration = None

    def tokenize(self, texts):
        return torch.tensor([[text.split().count(c) for c in COLOURS] for text in texts])

    def encode_text(self, tokens):
        return torch.nn.functional.normalize(tokens.float() + 0.1, dim=-1)

    def encode_image(self, images):
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


@pytest.fixture
def pictures(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def by_hand(colour, labels, scale=10.0):
    image = np.array(COLOURS[colour]) / np.linalg.norm(COLOURS[colour])
    texts = np.array([[0.1 + label.split().count(c) for c in COLOURS] for label in labels])
    cosines = texts @ image / np.linalg.norm(texts, axis=1)
    weights = np.exp(scale * cosines)
    return cosines, weights / weights.sum()


def run(paths, labels, **options):
    return list(classify(paths, **{"model": ColourModel(), **options}, labels=labels))


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": "red"}, "put a single one into a list"),
        ({"images": "red.png"}, "put a single one into a list"),
        ({"images": Image.new("RGB", (9, 9))}, "put a single one into a list"),
        ({"labels": ["red", 2]}, "labels must be texts, not 2"),
        ({"model": "runs/demo"}, "'runs/demo' is a path: give the model"),
    ],
)
def test_what_is_no_list_is_not_taken_apart(given, message):
    with pytest.raises(UserError, match=message):
        classify(**{"images": [], "labels": ["red"], "model": ColourModel(), **given})


def test_many_labels_are_embedded_in_batches_as_they_are_one_by_one(pictures, monkeypatch):
    labels = [f"{'red ' * i}green {'blue ' * (600 - i)}" for i in range(600)]
    (result,) = run([pictures / "red.png"], labels, top=600)
    cosines, _ = by_hand("red", labels)
    assert [s.cosine for s in result.scores] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)


def test_a_model_with_a_bias_judges_each_label_by_itself(pictures):
    model = ColourModel()
    model.logit_bias = torch.tensor(-5.0)
    model.calibration = calibration(temperature=2.0)  # of a softmax, and so none of its business
    (result,) = run([pictures / "red.png"], ["red", "blue"], model=model)
    cosines, _ = by_hand("red", ["red", "blue"])
    expected = 1 / (1 + np.exp(5 - 10 * cosines))
    assert [s.probability for s in result.scores] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_calibrated_bias_gives_the_chance_of_each_label_and_half_of_it_is_the_threshold(pictures):
    model = ColourModel()
    model.logit_bias = torch.tensor(-5.0)
    model.calibration = calibration(temperature=0.5, bias=1.5)
    (known,), (unknown,) = (run([pictures / "red.png"], [label], model=model) for label in ("red", "blue"))
    for result, label in ((known, "red"), (unknown, "blue")):
        (score,) = result.scores  # of a single label: no background stands against it
        (cosine,), _ = by_hand("red", [label])
        assert score.probability == pytest.approx(1 / (1 + np.exp(-((10 * cosine - 5) / 0.5 + 1.5))), abs=1e-5)
    assert known.answer == "red" and known.scores[0].probability > 0.5
    assert unknown.answer is None and unknown.scores[0].probability < 0.5
    assert unknown.unknown.threshold.value == pytest.approx((5 - 0.5 * 1.5) / 10)
    assert "right and wrong labels are equally likely there" in unknown.unknown.reason


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise puts the bright upper half to the right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    seen = []
    model = ColourModel()
    model.preprocess = lambda image: (seen.append(np.asarray(image)), ColourModel.preprocess(model, image))[1]
    run([tmp_path / "x.png", Image.open(tmp_path / "x.png")], ["red", "blue"], model=model)
    for upright in seen:
        np.testing.assert_array_equal(upright, np.rot90(pixels, -1))
    assert len(seen) == 2


def test_files_and_pictures_in_memory_may_be_mixed_and_keep_their_order(pictures):
    (pictures / "bad.png").write_bytes(b"no picture at all")
    opened = Image.open(pictures / "blue.png")
    results = run([str(pictures / "red.png"), pictures / "bad.png", opened], list(COLOURS))
    assert [r.picture for r in results] == [str(pictures / "red.png"), str(pictures / "bad.png"), "picture 2"]
    assert [r.answer for r in results] == ["red", None, "blue"]
    assert results[1].error == "unknown format"


def calibration(*, temperature=None, bias=None, thresholds=None, prompts=(), templates=()):
    reliability = Reliability(ece=0, nll=0, brier=0, accuracy=1, counts=[], confidences=[], accuracies=[])
    return Calibration(
        weights_sha256="",
        model="toy",
        temperature=temperature and Temperature(
            value=temperature, bias=bias, data="toys", num_fitted=1, num_tested=1, date="",
            before=reliability, after=reliability,
        ),
        rejection=thresholds and Rejection(
            thresholds=thresholds, known_passing={}, foreign_passing={}, auroc={}, coverages=[], risks=[],
            data="toys", num_fitted=1, num_tested=1, num_foreign={}, templates=list(templates),
            prompts_sha256=hash_prompts(prompts), date="",
        ),
    )  # fmt: skip


def test_the_measured_temperature_divides_the_logits(pictures):
    model = ColourModel()
    model.calibration = calibration(temperature=4.0)
    labels = ["red", "red and green"]
    (result,) = run([pictures / "red.png"], labels, model=model)
    _, probabilities = by_hand("red", labels, scale=10 / 4)
    assert [s.probability for s in result.scores] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_below_the_similarity_asked_for_the_answer_is_unknown(pictures):
    labels = ["blue and green", "green"]
    cosines, _ = by_hand("red", labels)
    for least, is_known in ((cosines.max() - 0.01, True), (cosines.max() + 0.01, False), (-1, True), ("off", True)):
        (result,) = run([pictures / "red.png"], labels, min_similarity=least)
        assert result.answer == ("blue and green" if is_known else None)
        assert [s.label for s in result.scores] == labels  # the nearest are told all the same
        if not is_known:
            assert result.unknown.value == pytest.approx(cosines.max(), abs=1e-5)
            assert (result.unknown.threshold.value, result.unknown.nearest) == (least, "blue and green")
            assert f"{cosines.max():.3g} is below max cosine {least:.3g}" in result.unknown.reason


def test_without_a_measured_threshold_there_is_always_an_answer(pictures):
    (result,) = run([pictures / "red.png"], ["green", "blue"])
    assert result.answer == "green"


def test_the_measured_threshold_is_on_the_cosine_for_free_labels_and_on_mcm_for_those_it_was_measured_with(pictures):
    model = ColourModel()
    labels = ["red", "green", "blue"]
    cosines, _ = by_hand("red", labels)
    mcm = np.exp(cosines).max() / np.exp(cosines).sum()
    for slack, is_known in ((-0.01, True), (0.01, False)):
        thresholds = {RejectScore.max_cosine: 2.0, RejectScore.mcm: mcm + slack}
        model.calibration = calibration(thresholds=thresholds, prompts=["blue", "green", "red"])
        (result,) = run([pictures / "red.png"], labels, model=model)
        assert (result.answer == "red") == is_known
        if not is_known:
            assert result.unknown.threshold.score is RejectScore.mcm
            assert result.unknown.value == pytest.approx(mcm, abs=1e-5)
        (result,) = run([pictures / "red.png"], labels[:2], model=model)  # other labels: other probabilities
        assert result.unknown.threshold == (RejectScore.max_cosine, 2.0, "95 % of the pictures of toys reach it")


def test_a_threshold_that_was_measured_with_other_templates_says_so(pictures, tmp_path):
    model = ColourModel()
    file = tmp_path / "templates.txt"
    file.write_text("a {c}\nthe {c}\n")
    model.calibration = calibration(thresholds={RejectScore.max_cosine: 2.0}, templates=["a {}", "the {}"])
    (same,) = run([pictures / "red.png"], ["red", "blue"], model=model, templates=str(file))
    assert same.unknown.threshold.origin == "95 % of the pictures of toys reach it"
    (other,) = run([pictures / "red.png"], ["red", "blue"], model=model)
    assert other.unknown.threshold.origin.endswith("reach it, with labels in 'a {}' and 1 more templates")


def test_a_single_label_is_compared_with_background_prompts_but_rejected_by_its_own_cosine(pictures):
    (cosine,) = by_hand("red", ["green"])[0]
    (result,) = run([pictures / "red.png"], ["green"], min_similarity=cosine + 0.05)
    assert result.answer is None
    assert result.unknown.nearest == "green"
    assert result.unknown.value == pytest.approx(cosine, abs=1e-5)
    assert {s.label for s in result.scores} == {"green", *(f"({b})" for b in BACKGROUND)}


@pytest.mark.parametrize(
    "options",
    [
        {"labels": []},
        {"top": 0},
        {"min_similarity": 1.5},
        {"min_similarity": "high"},
        {"templates": "none.txt"},
        {"min_similarity": None},
        {"templates": ["a {}"]},
    ],
)
def test_mistakes_are_refused_at_once(pictures, options):
    with pytest.raises(UserError):
        classify([pictures / "red.png"], **{"model": ColourModel(), "labels": ["a", "b"], **options})
