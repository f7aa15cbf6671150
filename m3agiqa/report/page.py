"""Figures -> one HTML file that needs nothing else: no network, no other file."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from m3agiqa.aspects import Aspect
from m3agiqa.progress import duration
from m3agiqa.report import charts
from m3agiqa.report.drift import AspectDrift
from m3agiqa.report.gather import AspectFigures, GeneratorFigures, PairFigures, Problem
from m3agiqa.report.pictures import Thumbnail
from m3agiqa.report.strips import Strip
from m3agiqa.runs import Manifest, differences, engine_line, predictor_line

_LONGEST = 4000
"""Characters of a prompt or a description that the page holds: a prompt may be a book."""


@dataclass(frozen=True)
class Figures:
    """All that a report shows; an empty part is left out of the page.

    Attributes:
        counts: rows by status.
        rows: id -> what the dialog shows of the row (`strips.details`), for every id of `strips`.
        pictures: id -> thumbnail, for the same.
        drift: against the run at `against`.
    """

    uri: str
    counts: Mapping[str, int]
    aspects: Sequence[AspectFigures]
    pairs: Sequence[PairFigures]
    generators: Sequence[GeneratorFigures]
    problems: Sequence[Problem]
    strips: Sequence[Strip]
    rows: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, Thumbnail]
    manifest: Manifest | None = None
    curation: Mapping[str, Any] | None = None
    against: str | None = None
    drift: Sequence[AspectDrift] = field(default_factory=list)
    other_manifest: Manifest | None = None


def render(figures: Figures) -> str:
    """The page as HTML. Every text that is not ours is escaped, and stays text."""
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    number = {name: i for i, name in enumerate(figures.rows)}
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_asset),
    )
    environment.filters |= {"count": "{:,}".format, "score": _score, "share": "{:.0%}".format}
    return environment.get_template("page.html").render(
        figures=figures,
        charts=charts,
        # Only our own script may run, whatever else gets into the page.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        name=figures.uri.rstrip("/").rsplit("/", 1)[-1] or figures.uri,
        total=sum(figures.counts.values()),
        number=number,
        data=script_json([_row(name, figures.rows[name], figures.pictures.get(name)) for name in figures.rows]),
        scored={name: _captions(figures.rows[name]) for name in figures.rows},
        funnel=_funnel(figures.curation),
        facts=_facts(figures),
        settings=_settings(figures),
        changed=_changed(figures),
    )


def _asset(name: str) -> str:
    return (files("m3agiqa.report") / name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element, or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _row(name: str, row: Mapping[str, Any], picture: Thumbnail | None) -> dict[str, Any]:
    """What the dialog needs of a row, as JSON."""
    picture = picture or Thumbnail(reason="not read")
    return {
        "id": name,
        "prompt": _cut(row["prompt"]),
        "generator": row["generator"],
        "image": row["image"],
        "size": f"{row['width']} × {row['height']} pixels" if row["width"] else None,
        "src": picture.uri,
        "reason": picture.reason,
        "aspects": [
            {key: _rounded(value) for key, value in aspect.items()} | {"description": _cut(aspect["description"])}
            for aspect in row["aspects"]
        ],
    }


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _LONGEST else text[:_LONGEST] + " …"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def _captions(row: Mapping[str, Any]) -> dict[Aspect | None, str]:
    """What stands below a picture: an aspect's score, or (under None) all of them."""
    scores = {Aspect(aspect["name"]): _score(aspect["score"]) for aspect in row["aspects"]}
    return scores | {None: " · ".join(scores.values())}


def _funnel(curation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a curation with the share of the first rows that is left after each."""
    steps = (curation or {}).get("funnel") or []
    if not steps:
        return []
    begun = steps[0]["dropped"] + steps[0]["left"]
    return [{**step, "share": step["left"] / begun if begun else 0.0} for step in steps]


def _facts(figures: Figures) -> list[tuple[str, str]]:
    """Where the scores come from and how fast they came, as names and values."""
    facts: list[tuple[str, str | None]] = [("folder", figures.uri)]
    if figures.curation is not None:
        scalars = {key: value for key, value in figures.curation.items() if isinstance(value, str | int | float)}
        facts += [(f"curation: {key}", str(value)) for key, value in scalars.items()]
    if (run := figures.manifest) is not None:
        engine, model = run.fingerprint_parts.get("engine", {}), run.config.get("model") or {}
        speed = f"{run.images_per_second:,.1f} images/s once the engine was up" if run.images_per_second else None
        facts += [
            ("input", run.input),
            ("model", str(model.get("path")) if engine.get("kind") != "simulated" else None),
            ("adapters", str(model["adapters"]) if model.get("adapters") else None),
            ("predictor", str((run.config.get("predictor") or {}).get("path") or "none")),
            ("engine", " ".join(str(engine[key]) for key in ("kind", "version") if engine.get(key))),
            ("speed of the last command", speed),
            ("its time", duration(run.seconds) if run.seconds else None),
            ("tokens", engine_line(run.engine)),
            ("predictor's work", predictor_line(run)),
            ("began", run.started),
            ("ended", run.finished),
            ("fingerprint", run.fingerprint),
            ("m3agiqa", run.m3agiqa),
        ]
    return [(name, value) for name, value in facts if value]


def _settings(figures: Figures) -> list[tuple[str, str]]:
    """Titles and YAML of what decides the scores and the selection."""
    found: list[tuple[str, Any]] = []
    if figures.curation is not None and figures.curation.get("recipe"):
        found.append(("Recipe", figures.curation["recipe"]))
    if figures.manifest is not None:
        found += [
            ("What decides a score", figures.manifest.fingerprint_parts),
            ("Configuration", figures.manifest.config),
        ]
    return [(title, yaml.safe_dump(value, sort_keys=False, allow_unicode=True)) for title, value in found]


def _changed(figures: Figures) -> list[str] | None:
    """Names of what differs between two runs; None where it is not known."""
    if figures.other_manifest is None:
        return None
    if figures.manifest is None:
        # A curation keeps the fingerprint of the scores that it chose from.
        same = (figures.curation or {}).get("fingerprint") == figures.other_manifest.fingerprint
        return [] if same else None
    return differences(figures.other_manifest.fingerprint_parts, figures.manifest.fingerprint_parts)
