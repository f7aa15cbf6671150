"""Charts as SVG, drawn by hand: their colours come from the page's style, so that they follow light and dark.

Every chart has a text that says what it shows, and holds no text of a user's.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from m3agiqa.aspects import RATING_WORDS, SCALE_MAX
from m3agiqa.report.gather import Spread

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 140, 8, 20, 8


def histogram(counts: Sequence[int], label: str, median: float | None = None) -> Markup:
    """Bars over the scale of scores, with a mark at the median."""
    top = max(max(counts), 1)
    width = (_WIDTH - 2 * _LEFT) / len(counts)
    room = _HEIGHT - _BOTTOM - _TOP
    parts = [
        f'<rect class="bar" x="{_LEFT + i * width + 0.4:.1f}" y="{_TOP + room * (1 - n / top):.1f}" '
        f'width="{width - 0.8:.1f}" height="{room * n / top:.1f}"/>'
        for i, n in enumerate(counts)
        if n
    ]
    if median is not None:
        x = _x(median)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{_HEIGHT - _BOTTOM}"/>')
    return _svg(_WIDTH, _HEIGHT, label, [*parts, *_axis()])


def two_histograms(here: Sequence[int], there: Sequence[int], label: str) -> Markup:
    """Two outlines over the scale, each of area one: runs of different size can be compared."""
    shares = [np.asarray(counts) / max(sum(counts), 1) for counts in (here, there)]
    top = max(float(max(share.max() for share in shares)), 1e-9)
    room = _HEIGHT - _BOTTOM - _TOP
    parts = []
    for share, kind in zip(shares, ("here", "there"), strict=True):
        width = (_WIDTH - 2 * _LEFT) / len(share)
        points: list[tuple[float, float]] = [(_LEFT, _HEIGHT - _BOTTOM)]
        for i, value in enumerate(share):
            y = _TOP + room * (1 - value / top)
            points += [(_LEFT + i * width, y), (_LEFT + (i + 1) * width, y)]
        points.append((_WIDTH - _LEFT, _HEIGHT - _BOTTOM))
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    return _svg(_WIDTH, _HEIGHT, label, [*parts, *_axis()])


def heat_map(cells: np.ndarray, x_name: str, y_name: str, label: str) -> Markup:
    """Counts [x, y] as squares, stronger for more on a scale of square roots; y goes up."""
    side, left, top = 220, 26, 8
    size, most = side / len(cells), max(int(cells.max()), 1)
    parts = [f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    for i, j in np.argwhere(cells > 0):
        strength = 0.12 + 0.88 * float(np.sqrt(cells[i, j] / most))
        parts.append(
            f'<rect class="cell" x="{left + i * size:.1f}" y="{top + side - (j + 1) * size:.1f}" '
            f'width="{size:.1f}" height="{size:.1f}" opacity="{strength:.2f}"/>'
        )
    for value in range(int(SCALE_MAX) + 1):
        at = side * value / SCALE_MAX
        parts.append(f'<text x="{left + at:.1f}" y="{top + side + 14}" text-anchor="middle">{value}</text>')
        parts.append(f'<text x="{left - 6}" y="{top + side - at + 4:.1f}" text-anchor="end">{value}</text>')
    middle, below = top + side / 2, top + side + 29
    parts.append(f'<text x="{left + side / 2}" y="{below}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(f'<text transform="translate(9 {middle}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return _svg(left + side + 8, below + 5, label, parts)


def box(spread: Spread, label: str) -> Markup:
    """A thin line from 5 to 95 %, a thick one from 25 to 75 %, and the median."""
    width, height = 130, 18
    low, quarter, median, three, high = (4 + (width - 8) * q / SCALE_MAX for q in spread.quantiles)
    parts = [
        f'<line class="base" x1="4" x2="{width - 4}" y1="9" y2="9"/>',
        f'<line class="thin" x1="{low:.1f}" x2="{high:.1f}" y1="9" y2="9"/>',
        f'<rect class="bar" x="{quarter:.1f}" y="5" width="{max(three - quarter, 1):.1f}" height="8" rx="2"/>',
        f'<line class="mark" x1="{median:.1f}" x2="{median:.1f}" y1="2" y2="16"/>',
    ]
    return _svg(width, height, label, parts)


def words(counts: Sequence[int]) -> Markup:
    """The rating words as one bar of five parts, with their shares below."""
    total = sum(counts)
    if not total:
        return Markup("")
    shares = [(word, n / total) for word, n in zip(RATING_WORDS, counts, strict=True)]
    parts = "".join(f'<i class="{word}" style="flex:{share:.4f}"></i>' for word, share in shares if share)
    legend = "".join(f'<li><i class="{word}"></i>{word} {share:.0%}</li>' for word, share in shares)
    # The legend says the same in text.
    return Markup(f'<div class="words" aria-hidden="true">{parts}</div><ul class="legend">{legend}</ul>')


def _x(score: float) -> float:
    return _LEFT + (_WIDTH - 2 * _LEFT) * score / SCALE_MAX


def _axis() -> list[str]:
    y = _HEIGHT - _BOTTOM
    line = f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{y}" y2="{y}"/>'
    return [line] + [
        f'<text x="{_x(value):.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{value}</text>'
        for value in range(int(SCALE_MAX) + 1)
    ]


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    drawn = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{drawn}</svg>'
    )
