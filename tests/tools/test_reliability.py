"""The reliability diagram: bars to scale, and nothing but numbers in it."""

from xml.etree import ElementTree

import pytest

from clip_train.calibration import Reliability, Temperature
from clip_train.tools.reliability import BAR, INK, OVER, SIDE, UNDER, reliability_diagram

SVG = "{http://www.w3.org/2000/svg}"
BEFORE = Reliability(
    ece=0.2, nll=1, brier=1, accuracy=0.5, counts=[0, 10, 5], confidences=[None, 0.5, 0.9], accuracies=[None, 0.7, 0.6]
)
AFTER = Reliability(
    ece=0.0, nll=1, brier=1, accuracy=0.5, counts=[1, 0, 0], confidences=[0.25, None, None],
    accuracies=[0.0, None, None],
)  # fmt: skip
TEMPERATURE = Temperature(value=1.5, data="x", num_fitted=1, num_tested=15, before=BEFORE, after=AFTER, date="")


def bars(colour):
    root = ElementTree.fromstring(reliability_diagram(TEMPERATURE, standalone=True))
    found = [r for r in root.iter(f"{SVG}rect") if r.get("fill") == colour]
    return [(float(r.get("x")), float(r.get("height"))) for r in found]


def test_bars_are_as_high_as_the_answers_are_right_and_the_gap_to_the_confidence_is_marked():
    assert [height for _, height in bars(BAR)] == pytest.approx([0.5 * SIDE, 0.6 * SIDE, 0])
    assert [height for _, height in bars(UNDER)] == pytest.approx([0.2 * SIDE])
    assert [height for _, height in bars(OVER)] == pytest.approx([0.3 * SIDE, 0.25 * SIDE])
    shares = [height for _, height in bars(INK)]
    assert shares[1] == pytest.approx(shares[0] / 2)


def test_bins_stand_at_their_confidence_and_empty_ones_have_no_bar():
    (second, third, other), _ = zip(*bars(BAR), strict=True)
    assert third - second == pytest.approx(SIDE / 3, abs=0.1)
    assert other > third
    assert len(bars(INK)) == 3


def test_titles_tell_temperature_and_error():
    text = "".join(ElementTree.fromstring(reliability_diagram(TEMPERATURE, standalone=True)).itertext())
    assert "before: ECE 20.0 %" in text
    assert "at temperature 1.50: ECE 0.0 %" in text
