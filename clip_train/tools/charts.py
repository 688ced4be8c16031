"""The geometry of line charts; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 30
MAX_POINTS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One curve, ready to be drawn in a box of WIDTH × HEIGHT."""

    title: str
    latest: str
    """The last value, for the heading."""
    path: str
    """SVG path data; lost values interrupt it."""
    end: tuple[float, float]
    """The last point."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference: Tick | None
    """A dashed level line, such as that of guessing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One of several curves in the same axes."""

    name: str
    latest: str
    """The last value."""
    path: str
    """SVG path data; lost values interrupt it."""
    end: tuple[float, float]
    """The last point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """Several curves in the same axes, ready to be drawn in a box of WIDTH × HEIGHT."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference: Tick | None
    """A dashed level line, such as that of guessing."""


def line_chart(
    points: Sequence[tuple[float, float | None]],
    *,
    title: str,
    unit: str = "",
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """Lay out a curve, or return None if fewer than two points have a value.

    Args:
        points: (x, y) in order of x, from 0 on; y is None where the value was lost.
        title: heading.
        unit: `%` shows shares in [0, 1] as percent; anything else follows the number.
        reference: name and value of a level to compare with.
        from_zero: the y axis starts at 0.
    """
    drawn = overlay_chart({title: points}, title=title, unit=unit, reference=reference, from_zero=from_zero)
    if drawn is None:
        return None
    (line,) = drawn.lines
    return Chart(
        title=title, latest=line.latest, path=line.path, end=line.end, x_ticks=drawn.x_ticks, y_ticks=drawn.y_ticks,
        reference=drawn.reference,
    )  # fmt: skip


def overlay_chart(
    curves: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    title: str,
    unit: str = "",
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> Overlay | None:
    """Lay out curves in the same axes, or return None if none has two points with a value; such ones are left out.

    Args:
        curves: by name, otherwise as the points of `line_chart`.
        title: see `line_chart`.
        unit: see `line_chart`.
        reference: see `line_chart`.
        from_zero: see `line_chart`.
    """
    finite = {
        name: [(x, None if y is None or not math.isfinite(y) else y) for x, y in points]
        for name, points in curves.items()
    }
    finite = {name: points for name, points in finite.items() if sum(y is not None for _, y in points) >= 2}
    if not finite:
        return None
    values = [y for points in finite.values() for _, y in points if y is not None]
    level = [reference[1]] if reference else []
    low, high = min(values + level), max(values + level)
    y_values = ticks(0.0 if from_zero else low, high)
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    x_high = max(points[-1][0] for points in finite.values())

    def to_x(x: float) -> float:
        return LEFT + x / (x_high or 1) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def to_line(name: str, points: Sequence[tuple[float, float | None]]) -> Line:
        places = [(to_x(x), None if y is None else to_y(y)) for x, y in thin(points)]
        end_x, end_y = next((x, y) for x, y in reversed(points) if y is not None)
        end = (round(to_x(end_x), 1), round(to_y(end_y), 1))
        return Line(name=name, latest=show(end_y, unit=unit), path=_path(places), end=end)

    return Overlay(
        title=title,
        lines=[to_line(name, points) for name, points in finite.items()],
        x_ticks=[Tick(at=round(to_x(x), 1), label=compact(x)) for x in ticks(0, x_high, count=5) if x <= x_high],
        y_ticks=[Tick(at=round(to_y(y), 1), label=show(y, unit=unit)) for y in y_values],
        reference=Tick(at=round(to_y(reference[1]), 1), label=reference[0]) if reference else None,
    )


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Return about `count` round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(
    points: Sequence[tuple[float, float | None]], *, max_points: int = MAX_POINTS
) -> list[tuple[float, float | None]]:
    """Replace neighbouring points by their mean until at most about `max_points` are left. Lost values stay gaps."""
    size = -(-len(points) // max_points)
    if size <= 1:
        return list(points)
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [y for _, y in group if y is not None]
        thinned.append((group[-1][0], sum(values) / len(values) if values else None))
    return thinned


def show(value: float, *, unit: str = "") -> str:
    """Write a number as people do: three significant digits, percent for shares, powers of ten where it is tiny."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}{unit}"
    if abs(value) >= 10_000:
        return compact(value) + unit
    digits = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return digits + unit


def compact(value: float) -> str:
    """Write a count briefly: 950, 12k, 3.2M."""
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _path(places: Sequence[tuple[float, float | None]]) -> str:
    parts, pen_down = [], False
    for x, y in places:
        if y is not None:
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = y is not None
    return "".join(parts)
