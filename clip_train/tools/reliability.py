"""Draw how often answers of each confidence are right, as one SVG that stands in a page or by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_train.calibration import Reliability, Temperature

WIDTH, HEIGHT = 640, 346
SIDE, LEFT, TOP, GAP = 240, 52, 34, 74  # of a square panel, pixels
SHARES_HEIGHT = 28  # of the bars below it
INK, LINE, BAR, OVER, UNDER = "#85817a", "#b9b5ad", "#4b83bd", "#cf6a54", "#7fa9d2"  # legible on white and on black


def reliability_diagram(temperature: Temperature, *, standalone: bool) -> str:
    """Return an SVG: accuracy in each bin of confidence against the diagonal, before and after calibration.

    The part of a bar that is missing to the diagonal is red (too sure), what exceeds it is pale. The grey bars below
    are the share of the answers in each bin.

    Args:
        temperature: with both reliabilities.
        standalone: a file of its own, which must name the language; a page does not.
    """
    titles = (
        f"before: ECE {100 * temperature.before.ece:.1f} %",
        f"at temperature {temperature.value:.2f}: ECE {100 * temperature.after.ece:.1f} %",
    )
    panels = [
        _panel(one, title=title, left=LEFT + place * (SIDE + GAP))
        for place, (one, title) in enumerate(zip((temperature.before, temperature.after), titles, strict=True))
    ]
    language = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    return (
        f'<svg{language} viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="Reliability diagram" font-family="sans-serif" font-size="12">\n' + "\n".join(panels) + "\n</svg>"
    )


def _panel(reliability: Reliability, *, title: str, left: float) -> str:
    bottom = TOP + SIDE
    parts = [
        _text(left + SIDE / 2, TOP - 14, title, size=13),
        _text(left - 6, TOP - 14, "right", anchor="end"),
        _text(left + SIDE / 2, bottom + SHARES_HEIGHT + 40, "confidence; grey: share of the answers"),
    ]
    for level in (0, 0.5, 1):
        y, x = bottom - SIDE * level, left + SIDE * level
        parts.append(f'<path d="M{left} {y:.1f}h{SIDE}" stroke="{LINE}" stroke-width="0.6"/>')
        parts.append(_text(left - 6, y + 4, f"{100 * level:.0f} %", anchor="end"))
        parts.append(_text(x, bottom + SHARES_HEIGHT + 22, f"{100 * level:.0f} %"))
    num_bins, total = len(reliability.counts), sum(reliability.counts)
    width = SIDE / num_bins
    most = max(reliability.counts)
    rows = zip(reliability.counts, reliability.confidences, reliability.accuracies, strict=True)
    for i, (count, confidence, accuracy) in enumerate(rows):
        if confidence is None or accuracy is None:
            continue
        x = left + i * width + 1
        low, high = sorted((confidence, accuracy))
        gap = OVER if confidence > accuracy else UNDER
        tip = f"{count} of {total}: confidence {100 * confidence:.1f} %, right {100 * accuracy:.1f} %"
        share = SHARES_HEIGHT * count / most
        parts.append(
            f"<g><title>{tip}</title>"
            + _bar(x, bottom - SIDE * low, width=width - 2, height=SIDE * low, colour=BAR)
            + _bar(x, bottom - SIDE * high, width=width - 2, height=SIDE * (high - low), colour=gap)
            + _bar(x, bottom + 6 + SHARES_HEIGHT - share, width=width - 2, height=share, colour=INK)
            + "</g>"
        )
    parts.append(f'<path d="M{left} {bottom}L{left + SIDE} {TOP}" stroke="{INK}" stroke-dasharray="5 4"/>')
    return "\n".join(parts)


def _bar(x: float, y: float, *, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">{text}</text>'
