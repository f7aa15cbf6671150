"""Evaluates scores against human scores: figures, baselines, comparisons, plots and a report in one folder.

OUT/evaluation.json     every figure; the same input gives the same bytes
OUT/errors.parquet      a row an image: human score, and each scorer's score and error, by aspect
OUT/report.md           the figures as tables, with what is to be known of them
OUT/plots/              the pictures of the report, as PNG and SVG
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa import __version__
from m3agiqa.aspects import RATING_LEVELS, Aspect
from m3agiqa.corpus.files import local_out
from m3agiqa.errors import UserError
from m3agiqa.evaluation import baselines, words
from m3agiqa.evaluation.bootstrap import LEVEL
from m3agiqa.evaluation.draws import Ints
from m3agiqa.evaluation.figures import BINS, Assessor, Rows, Sampling, Scorer
from m3agiqa.evaluation.gather import (
    Gathered,
    Request,
    digests,
    facts_of,
    gather,
    other_scorers,
    own_scorers,
    predictor_of,
    stated_level,
)
from m3agiqa.evaluation.groups import Grouping
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.evaluation.overlap import shared
from m3agiqa.evaluation.plots import draw_all
from m3agiqa.evaluation.report import markdown
from m3agiqa.ratings import fits
from m3agiqa.seen import Seen, read

RESULT, ERRORS, REPORT, PLOTS = "evaluation.json", "errors.parquet", "report.md", "plots"
FORMAT = 1
# Digits that are kept: beyond them, another build of a library gives others.
_DIGITS = 8
_MADE_FROM = 0.99
_KINDS = ("baseline", "model", "other")


def evaluate(request: Request) -> dict[str, Any]:
    """Evaluates and writes the folder `request.out`, as a whole or not at all.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: for input that cannot be evaluated, and an output folder that holds something else.
    """
    out = _out_folder(request.out)
    gathered = gather(request)
    marks = _check_training(request, gathered)
    labels = {aspect: gathered.label(aspect) for aspect in gathered.labels}
    found: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    plotted: dict[str, Any] = {}
    for aspect, values in labels.items():
        rows = gathered.evaluated[np.isfinite(values[gathered.evaluated])]
        if len(rows) < 2:
            flag = f"--label {aspect}={gathered.labels[aspect]}"
            raise UserError(flag, f"{len(rows)} evaluated rows have it", "give at least 2, better hundreds")
        scorers = _scorers(request, gathered, aspect, labels, rows)
        names = _column_names(aspect, scorers)
        found[str(aspect)] = _aspect(request, gathered, aspect, values, rows, scorers)
        columns |= _error_columns(aspect, values, rows, scorers, names)
        if request.plots:
            plotted[str(aspect)] = (values[rows], scorers[0].scores)
    result = _rounded(_content(request, gathered, marks, found))
    errors = _errors_table(gathered, columns)
    _write(out, result, errors, plotted)
    return result


def _scorers(
    request: Request, gathered: Gathered, aspect: Aspect, labels: dict[Aspect, Floats], rows: Ints
) -> list[Scorer]:
    """Every scorer of an aspect on the same rows [n]: ours, others', and those that look at no image."""
    own = own_scorers(gathered, request, aspect, rows)
    others = other_scorers(gathered, request, aspect, rows)
    values = labels[aspect]
    facts = facts_of(gathered, values)
    learnt = gathered.learnt(values)
    train = facts.take(learnt) if len(learnt) else None
    guesses = baselines.predict(facts.take(rows), train)
    blind = [Scorer(name, "baseline", scores) for name, scores in guesses.items()]
    wanted = words.of_scores(values[rows], BINS)
    majority = baselines.majority(wanted, words.of_scores(values[learnt], BINS) if len(learnt) else None)
    blind.append(Scorer("majority word", "baseline", np.array(RATING_LEVELS)[majority], majority))
    if aspect is Aspect.CORRESPONDENCE and Aspect.QUALITY in labels:
        note = "people's own quality score of the image, taken for correspondence"
        blind.append(Scorer("copy of quality", "baseline", labels[Aspect.QUALITY][rows], note=note))
    return [*own, *others, *blind]


def _aspect(
    request: Request, gathered: Gathered, aspect: Aspect, labels: Floats, rows: Ints, scorers: Sequence[Scorer]
) -> dict[str, Any]:
    """All figures of one aspect over its rows, of the human scores of all."""
    generators, prompts = (Grouping.of(gathered.known(name)).take(rows) for name in ("generator", "prompt"))
    assessor = Assessor(Rows(labels[rows], generators, prompts), Sampling(request.samples, request.seed), scorers)
    main = scorers[0]
    fitted = len(gathered.learnt(labels)) > 0
    if gathered.has_train and not fitted:
        column = gathered.labels[aspect]
        gathered.notes.append(f"no row of the training part has a {column} here: baselines are not fitted on that part")
    scored = gathered.scores.take(gathered.at[rows])
    intervals = None
    if main.name == f"{aspect}_mos" and f"{aspect}_mos_low" in scored.rows.column_names:
        low, high = (scored.numbers(f"{aspect}_mos_{end}", "--scores") for end in ("low", "high"))
        level = stated_level(predictor_of(request, gathered.scores), aspect)
        intervals = assessor.coverage(low, high, level)
    return {
        "label": gathered.labels[aspect],
        "label_scale": list(gathered.scale),
        "rows": len(rows),
        "training_rows": len(gathered.training) if gathered.has_train else None,
        "baselines": "fitted on the training part" if fitted else "fitted in five folds of these rows",
        "notes": _word_notes(gathered, rows, scorers),
        "scorers": [assessor.scorer(one) for one in scorers],
        "comparisons": [assessor.compare(main, one) for one in scorers[1:] if one.name != "majority word"],
        "generators": assessor.generators(main),
        "intervals": intervals,
    }


def _word_notes(gathered: Gathered, rows: Ints, scorers: Sequence[Scorer]) -> list[str]:
    """Words that agree with a column of human scores as only words made from it can."""
    notes = []
    for one in scorers:
        if one.words is None or one.kind != "model":
            continue
        named = [None if code < 0 else words.RATING_WORDS[code] for code in one.words.tolist()]
        columns = {gathered.labels[aspect]: gathered.label(aspect)[rows].tolist() for aspect in gathered.labels}
        for fit in fits(named, columns, BINS):
            if fit.same >= _MADE_FROM and fit.rows >= 30:
                notes.append(f"{one.name} agrees with the words of {fit.column} in {fit.same:.1%}: made from it?")
    return notes


def _check_training(request: Request, gathered: Gathered) -> list[str]:
    """Refuses rows that the predictor's or an adapter's training has met, or marks the report where that is forced."""
    rows = gathered.evaluated
    ids, prompts = (
        one.take(pa.array(rows)).to_pylist() for one in (gathered.truth.keys("id"), gathered.known("prompt"))
    )
    values = {"image": digests(gathered.scores, gathered.at[rows]), "id": ids, "prompt": prompts}
    marks = []
    for who, (where, known) in _trainings(request, gathered).items():
        for kind, of_rows in values.items():
            if met := known.met(kind, of_rows):
                rule = f"was trained on {len(met)} {kind}s of the evaluated rows ({', '.join(met[:5])})"
                if not request.force:
                    cure = "evaluate rows that it has not seen (m3agiqa split), or add --force: the report will say so"
                    raise UserError(f"{who} {where}", rule, cure)
                marks.append(f"The {who} {rule}")
    return marks


def _trainings(request: Request, gathered: Gathered) -> dict[str, tuple[str, Seen]]:
    """What the predictor and the adapters were trained on, as far as that is known; the rest goes into the notes.

    Returns:
        `predictor`, `adapter` -> where it is, or what scored with it; and its training.
    """
    folder, manifest = predictor_of(request, gathered.scores), gathered.scores.manifest
    found = {
        "predictor": (str(folder), None if folder is None else read(folder)),
        "adapter": (f"of {request.scores}", None if manifest is None else read(request.scores)),
    }
    known = {who: (where, training) for who, (where, training) in found.items() if training is not None}
    silent = [f"predictor {folder}"] if folder is not None and "predictor" not in known else []
    if manifest is not None:
        # A run of a version that asked no adapter has named none.
        unasked = "adapter" not in known and (manifest.fingerprint_parts.get("model") or {}).get("adapters")
        silent += [f"adapter {name}" for name in manifest.silent_adapters or (["of the run"] if unasked else [])]
    if not known or silent:
        who = f"the {' and the '.join(silent)}" if known else "the scorer"
        gathered.notes.append(f"what {who} was trained on is not known: that it has not met these rows, neither")
    return known


def _content(request: Request, gathered: Gathered, marks: list[str], aspects: dict[str, Any]) -> dict[str, Any]:
    common = None
    if gathered.has_train:
        part = [one if one == "train" or gathered.at[i] >= 0 else None for i, one in enumerate(gathered.part)]
        common = {f"{name}s": shared(part, gathered.known(name).to_pylist()) for name in ("prompt", "generator")}
    manifest = gathered.scores.manifest
    return {
        "m3agiqa": __version__,
        "format": FORMAT,
        "scores": request.scores,
        "fingerprint": manifest.fingerprint if manifest is not None else None,
        "truth": request.truth,
        "dataset": request.dataset,
        "split": request.split,
        "part": request.tested if request.split else None,
        "train": request.train,
        "bootstrap": {"samples": request.samples, "seed": request.seed, "level": LEVEL},
        "forced": marks,
        "notes": list(dict.fromkeys(gathered.notes)),
        "shared_with_training": common,
        "aspects": aspects,
    }


def _column_names(aspect: Aspect, scorers: Sequence[Scorer]) -> list[str]:
    """The column of errors.parquet for each scorer; NAME_error goes with one that is on our scale.

    Raises:
        UserError: for a scorer whose column would be that of the human scores, of a baseline or of another scorer.
    """
    names = [
        one.name if one.name.startswith(f"{aspect}_") else f"{aspect}_{one.name.replace(' ', '_')}" for one in scorers
    ]
    taken = {f"{aspect}_label"}
    # Names that the user gave come last, so that the error is about one of them.
    for name, one in sorted(zip(names, scorers, strict=True), key=lambda pair: _KINDS.index(pair[1].kind)):
        own = {name, f"{name}_error"} if one.same_scale else {name}
        if clash := own & taken:
            flag = f"--other {one.name}" if one.kind == "other" else f"the column {one.name}"
            raise UserError(flag, f"would be {min(clash)} in {ERRORS}, which is something else", "give it another name")
        taken |= own
    return names


def _error_columns(
    aspect: Aspect, labels: Floats, rows: Ints, scorers: Sequence[Scorer], names: Sequence[str]
) -> dict[str, Floats]:
    """Columns [n] over all rows of the human scores; NaN where a row was not evaluated."""
    found = {f"{aspect}_label": np.full(len(labels), np.nan)}
    found[f"{aspect}_label"][rows] = labels[rows]
    for name, one in zip(names, scorers, strict=True):
        values = np.full(len(labels), np.nan)
        values[rows] = one.scores
        found[name] = values
        if one.same_scale:
            found[f"{name}_error"] = values - found[f"{aspect}_label"]
    return found


def _errors_table(gathered: Gathered, columns: dict[str, Floats]) -> pa.Table:
    rows = gathered.truth.rows.select(["id", "image", "prompt", "generator"])
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
    return rows.take(pa.array(gathered.evaluated)).sort_by("id")


def _out_folder(out: str) -> Path:
    """The output folder, links followed.

    Raises:
        UserError: if it is not on this machine, or holds anything but an earlier evaluation.
    """
    folder = local_out(out, "give a local folder").resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}", "is a file", "give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULT).is_file():
        raise UserError(f"--out {out}", "is not empty and holds no evaluation", "give a new folder")
    return folder


def _write(out: Path, result: dict[str, Any], errors: pa.Table, plotted: dict[str, Any]) -> None:
    """Writes the folder beside its place, then moves it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        work = Path(temporary) / "evaluation"
        work.mkdir()
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        (work / RESULT).write_text(text + "\n", encoding="utf-8")
        pq.write_table(errors, work / ERRORS)
        plots = draw_all(result, plotted, work / PLOTS) if plotted else {}
        (work / REPORT).write_text(markdown(result, plots, PLOTS), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)


def _rounded(value: Any) -> Any:
    """Numbers with so many digits that the same input gives the same bytes."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, _DIGITS) + 0.0 if isinstance(value, float) else value
