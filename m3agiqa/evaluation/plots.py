"""The pictures of a report, as PNG and SVG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN
from m3agiqa.evaluation.metrics import Floats, fitted

_INK, _PALE, _WARM = "#1f5fa8", "#9db8d6", "#c8553d"
# Above so many points a scatter is a blot, and its SVG megabytes.
_MOST_POINTS = 2000
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "m3agiqa",
    "figure.constrained_layout.use": True,
}


def draw_all(result: Mapping[str, Any], points: Mapping[str, tuple[Floats, Floats]], folder: Path) -> dict[str, str]:
    """Draws what there is to draw.

    Args:
        result: what evaluation.json holds. points: aspect -> human scores [n] and scores [n] of the main scorer.
        folder: a new one.

    Returns:
        Title -> file name (PNG), in the order of the report.
    """
    folder.mkdir()
    made: dict[str, str] = {}

    def keep(name: str, title: str, draw: Callable[[Axes], None], **options: Any) -> None:
        with _axes(folder, name, **options) as axes:
            draw(axes)
        made[title] = f"{name}.png"

    with matplotlib.rc_context(_STYLE):
        for aspect, (labels, scores) in points.items():
            found = result["aspects"][aspect]
            known = np.isfinite(scores)
            y, x = labels[known], scores[known]
            main = found["scorers"][0]
            keep(f"{aspect}-scatter", f"{aspect}: scores against people", partial(_scatter, x=x, y=y))
            keep(f"{aspect}-residuals", f"{aspect}: errors by human score", partial(_residuals, x=x, y=y))
            if bins := (main.get("reliability") or {}).get("bins"):
                keep(f"{aspect}-reliability", f"{aspect}: reliability", partial(_reliability, bins=bins))
            if groups := [one for one in found["generators"] if one["srcc"]["value"] is not None]:
                title = f"{aspect}: SRCC within each generator"
                keep(f"{aspect}-generators", title, partial(_bars, groups=groups))
        if len(points) >= 3:
            title = "SRCC by aspect"
            keep("radar", title, partial(_radar, aspects=result["aspects"]), projection="polar")
    return made


@contextmanager
def _axes(folder: Path, name: str, projection: str | None = None) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(4.6, 3.8), subplot_kw={"projection": projection} if projection else {})
    try:
        yield axes
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    finally:
        plt.close(figure)


def _scatter(axes: Axes, x: Floats, y: Floats) -> None:
    if len(x) > _MOST_POINTS:
        cells = axes.hexbin(x, y, gridsize=45, mincnt=1, cmap="viridis", bins="log", rasterized=True)
        axes.figure.colorbar(cells, ax=axes, label="images")
    else:
        axes.scatter(x, y, c=_density(x, y), s=12, cmap="viridis", linewidths=0)
    low, high = min(x.min(), y.min(), SCALE_MIN) - 0.1, max(x.max(), y.max(), SCALE_MAX) + 0.1
    axes.plot((low, high), (low, high), color="grey", lw=1, ls=":", label="the same")
    if (after := fitted(x, y)) is not None:
        line = np.argsort(x)[np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int)]
        axes.plot(x[line], after[line], color=_WARM, lw=1.6, label="logistic fit")
    axes.set(xlabel="score", ylabel="human score", xlim=(low, high), ylim=(low, high))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _density(x: Floats, y: Floats) -> Floats:
    """How many points share the cell of each [n], cells smoothed with their neighbours."""
    counts, ex, ey = np.histogram2d(x, y, bins=24)
    padded = np.pad(counts, 1)
    smooth = sum(padded[1 + i : 25 + i, 1 + j : 25 + j] for i in (-1, 0, 1) for j in (-1, 0, 1))
    at = [np.clip(np.searchsorted(e, v, side="right") - 1, 0, 23) for e, v in ((ex, x), (ey, y))]
    return np.asarray(smooth, np.float64)[at[0], at[1]]


def _residuals(axes: Axes, x: Floats, y: Floats) -> None:
    edges = np.linspace(SCALE_MIN, SCALE_MAX, 11)
    place = np.clip(np.digitize(y, edges) - 1, 0, 9)
    kept = [i for i in range(10) if (place == i).any()]
    errors = [(x - y)[place == i] for i in kept]
    middles = (edges[:-1] + edges[1:])[kept] / 2
    axes.boxplot(errors, positions=middles, widths=0.35, showfliers=False, manage_ticks=False)
    axes.axhline(0, color="grey", lw=1, ls=":")
    axes.set(xlabel="human score", ylabel="score - human score", xlim=(SCALE_MIN, SCALE_MAX))


def _reliability(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    x, y, spread = (np.array([one[key] for one in bins]) for key in ("score", "label", "spread"))
    axes.plot((SCALE_MIN, SCALE_MAX), (SCALE_MIN, SCALE_MAX), color="grey", lw=1, ls=":")
    axes.errorbar(x, y, yerr=spread, color=_INK, marker="o", ms=4, lw=1.4, elinewidth=0.8, ecolor=_PALE, capsize=2)
    axes.set(xlabel="mean score of a tenth of the images", ylabel="mean human score (bars: one deviation)")


def _bars(axes: Axes, groups: Sequence[Mapping[str, Any]]) -> None:
    groups = groups[:20]
    values = np.array([one["srcc"]["value"] for one in groups])
    ends = [(one["srcc"]["low"], one["srcc"]["high"]) for one in groups]
    bars = np.array(
        [(v - low, high - v) if low is not None else (0, 0) for v, (low, high) in zip(values, ends, strict=True)]
    )
    places = np.arange(len(groups))[::-1]
    axes.barh(places, values, xerr=np.maximum(bars.T, 0), color=_PALE, ecolor=_INK, capsize=2)
    axes.set_yticks(places, [_plain(f"{one['generator']} ({one['rows']})") for one in groups], fontsize=8)
    axes.set_xlabel("SRCC within the generator, 95 % interval")


def _radar(axes: Axes, aspects: Mapping[str, Any]) -> None:
    names = list(aspects)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    around = np.append(angles, angles[0])
    by_kind: dict[str, list[float]] = {}
    for name in names:
        scorers = aspects[name]["scorers"]
        best = {"model": scorers[0], "generator + prompt": _named(scorers, "generator + prompt")}
        best |= {one["name"]: one for one in scorers if one["kind"] == "other"}
        for kind, one in best.items():
            value = ((one or {}).get("pooled") or {}).get("srcc", {}).get("value")
            by_kind.setdefault(kind, []).append(0.0 if value is None else max(value, 0.0))
    for kind, values in by_kind.items():
        if len(values) == len(names) and any(values):
            axes.plot(around, [*values, values[0]], marker="o", ms=3, lw=1.4, label=_plain(kind))
    axes.set_xticks(angles, names)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.15, -0.12))


def _plain(name: str) -> str:
    """A name that people gave, for matplotlib, to which what is between two dollar signs is a formula."""
    return name.replace("$", r"\$")


def _named(scorers: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    return next((one for one in scorers if one["name"] == name), None)
