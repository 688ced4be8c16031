"""Axes and curves of the report."""

import math
import re
from itertools import pairwise

import pytest

from clip_train.tools.charts import HEIGHT, LEFT, WIDTH, compact, line_chart, show, thin, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 5.55), (0.0002, 0.001), (14.3, 34.1), (0, 512_000), (3, 3), (-2, 7)])
def test_ticks_are_even_round_and_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a)), 6) for a, b in pairwise(found)}
    assert steps <= {1.0, 2.0, 2.5, 5.0, 10.0}
    assert 2 <= len(found) <= 7


def points_of(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_curve_is_drawn_to_scale():
    chart = line_chart([(0, 0.0), (50, 1.0), (100, 2.0)], title="x", from_zero=True)
    places = points_of(chart.path)
    assert places[0][0] == LEFT
    assert places[1] == pytest.approx(((places[0][0] + places[2][0]) / 2, (places[0][1] + places[2][1]) / 2), abs=0.1)
    assert places[0][1] > places[2][1]  # up is more
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_lost_values_interrupt_the_curve():
    chart = line_chart([(0, 1.0), (1, None), (2, float("nan")), (3, 2.0), (4, 3.0)], title="x")
    assert chart.path.count("M") == 2
    assert len(points_of(chart.path)) == 3


def test_the_reference_level_is_inside_the_picture_even_above_the_curve():
    chart = line_chart([(0, 1.0), (1, 1.2)], title="x", reference=("guessing", 8.3))
    assert 0 < chart.reference.at < min(y for _, y in points_of(chart.path))


def test_a_single_point_is_no_curve():
    assert line_chart([(0, 1.0), (1, None)], title="x") is None


def test_long_runs_are_thinned_to_means():
    thinned = thin([(float(i), float(i % 2)) for i in range(10_000)], max_points=100)
    assert len(thinned) == 100
    assert {y for _, y in thinned} == {0.5}


def test_numbers_read_as_people_write_them():
    assert [show(v) for v in (1.4321, 0.0005, 2250.4, 0, 34.25)] == ["1.43", "5e-4", "2250", "0", "34.2"]
    assert show(0.1234, unit="%") == "12.3 %"
    assert [compact(v) for v in (950, 12_000, 3_200_000, 2e9, 5e30)] == ["950", "12k", "3.2M", "2B", "5e+30"]
