"""An evaluation as markdown, and as a few lines for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3agiqa.aspects import RATING_WORDS
from m3agiqa.evaluation.metrics import METRICS

_TITLES = {"srcc": "SRCC", "plcc": "PLCC", "krcc": "KRCC", "rmse": "RMSE", "pairwise": "pairs"}
_TITLES |= {"plcc_fitted": "PLCC, fitted", "rmse_fitted": "RMSE, fitted"}


def markdown(result: Mapping[str, Any], plots: Mapping[str, str], folder: str) -> str:
    """The report; every figure with its 95 % interval where there is one. `docs/numbers.md` says what each means."""
    lines = ["# Evaluation", "", *_head(result), ""]
    for aspect, found in result["aspects"].items():
        lines += [f"## {aspect.capitalize()}", "", *_aspect(found)]
        pictures = {title: file for title, file in plots.items() if title.startswith(f"{aspect}: ")}
        lines += [*_pictures(pictures, folder), ""]
    rest = {title: file for title, file in plots.items() if ": " not in title}
    return "\n".join([*lines, *_pictures(rest, folder)]).rstrip() + "\n"


def summary(result: Mapping[str, Any]) -> list[str]:
    """A line for each scorer of each aspect."""
    lines = []
    for aspect, found in result["aspects"].items():
        lines.append(f"{aspect}: {found['rows']} rows, human scores {found['label']}; baselines {found['baselines']}")
        for one in found["scorers"]:
            kind = "no image: " if one["kind"] == "baseline" else ""
            if "pooled" not in one:
                lines.append(f"  {kind}{one['name']}: {one['reason']}")
                continue
            srcc, within = one["pooled"]["srcc"], one["within_generator"]
            inside = f", within generator {_value(within['srcc'])}" if within else ""
            words = one["words"]
            said = f", words right {_value(words['accuracy'])}" if words else ""
            lines.append(f"  {kind}{one['name']}: SRCC {_value(srcc)}{inside}{said}")
    return lines


def _head(result: Mapping[str, Any]) -> Iterator[str]:
    draws = result["bootstrap"]
    for mark in result["forced"]:
        yield f"> **Forced: the training has met the test set. {mark}. These figures flatter.**"
        yield ""
    for key in ("scores", "fingerprint", "truth", "dataset", "split", "part", "train"):
        if result[key] is not None:
            yield f"- {key}: `{result[key]}`"
    yield ""
    yield f"Intervals: {draws['level']:.0%}, {draws['samples']} bootstrap draws, seed {draws['seed']}. A dash: there is"
    yield "no such figure; evaluation.json has the reason."
    if result["notes"] or result["shared_with_training"]:
        yield ""
    for note in result["notes"]:
        yield f"- {note}"
    common = result["shared_with_training"] or {}
    for kind, pairs in common.items():
        if (one := pairs.get("train, test")) and one["of"]:
            share = f"{one['rows_share']:.1%} of its rows"
            yield f"- {one['shared']} of {one['of']} {kind} of the test part are also in training ({share})"


def _aspect(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['rows']} rows; human scores `{found['label']}` on {found['label_scale']}, brought to 0 to 5;"
    yield f"baselines {found['baselines']}."
    yield ""
    for note in found["notes"]:
        yield f"> {note}"
        yield ""
    scorers = found["scorers"]
    yield from _table(["scorer", *(_TITLES[name] for name in METRICS)], [_pooled_row(one) for one in scorers])
    yield "Within one generator, and within one prompt:"
    yield ""
    heads = ["scorer", "SRCC, generator", "pairs, generator", "SRCC, prompt", "pairs, prompt"]
    yield from _table(heads, [_within_row(one) for one in scorers if "pooled" in one])
    yield from _notes(scorers)
    if found["comparisons"]:
        heads = ["less", "rows", *(_TITLES[name] for name in ("srcc", "plcc", "krcc", "rmse", "pairwise"))]
        yield f"`{scorers[0]['name']}` less each of the others, in paired draws; bold: the interval leaves out 0."
        yield ""
        yield from _table(heads, [_difference_row(one) for one in found["comparisons"]])
    yield from _words(scorers)
    yield from _intervals(found["intervals"])
    if found["generators"]:
        heads = ["generator", "rows", "mean human score", "mean error", "SRCC", "RMSE"]
        rows = [
            [
                one["generator"],
                str(one["rows"]),
                f"{one['mean_label']:.2f}",
                "-" if one["bias"] is None else f"{one['bias']:+.2f}",
                _value(one["srcc"]),
                _value(one["rmse"]),
            ]
            for one in found["generators"]
        ]
        yield from _table(heads, rows)


def _notes(scorers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    noted = [f"- {one['name']}: {one['note']}" for one in scorers if one["note"]]
    for one in scorers:
        srcc = one["pooled"]["srcc"] if "pooled" in one else {}
        if "reason" in srcc:
            what = "no correlation" if srcc["value"] is None else "no interval of SRCC"
            noted.append(f"- {one['name']}: {what}, since {srcc['reason']}")
    if noted:
        yield from noted
        yield ""


def _words(scorers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    judged = [one for one in scorers if one.get("words")]
    if not judged:
        return
    yield "Rating words, against the words of the human scores in five equal bins:"
    yield ""
    rows = [
        [_shown_name(one), str(one["words"]["rows"])]
        + [_value(one["words"][key]) for key in ("accuracy", "within_one", "macro_f1")]
        for one in judged
    ]
    yield from _table(["scorer", "rows", "accuracy", "within one", "macro F1"], rows)
    main = judged[0]["words"]
    yield f"Of `{judged[0]['name']}`, people's word down and its word across:"
    yield ""
    rows = [[word, *(str(count) for count in main["confusion"][i])] for i, word in enumerate(RATING_WORDS)]
    f1 = ["F1", *("-" if main["f1"][word] is None else f"{main['f1'][word]:.3f}" for word in RATING_WORDS)]
    yield from _table(["", *RATING_WORDS], [*rows, f1])


def _intervals(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    meant = "" if found["stated_level"] is None else f" (meant: {found['stated_level']:.0%})"
    yield f"Of {found['rows']} intervals {_value(found['coverage'])} hold the human score{meant}; mean width"
    yield f"{found['mean_width']:.2f}; {found['below']:.1%} of the human scores lie below, {found['above']:.1%} above."
    yield ""


def _pooled_row(one: Mapping[str, Any]) -> list[str]:
    if "pooled" not in one:
        return [_shown_name(one), one["reason"], *([""] * (len(METRICS) - 1))]
    return [_shown_name(one), *(_value(one["pooled"][name]) for name in METRICS)]


def _within_row(one: Mapping[str, Any]) -> list[str]:
    cells = [_shown_name(one)]
    for kind in ("within_generator", "within_prompt"):
        found = one[kind]
        cells += ["-", "-"] if found is None else [_value(found["srcc"]), _value(found["pairwise"])]
    return cells


def _difference_row(one: Mapping[str, Any]) -> list[str]:
    cells = [one["theirs"], str(one["rows"])]
    for name in ("srcc", "plcc", "krcc", "rmse", "pairwise"):
        found = one["differences"].get(name)
        text = "-" if found is None else _value(found, signed=True)
        cells.append(f"**{text}**" if found and found["holds_up"] else text)
    return cells


def _shown_name(one: Mapping[str, Any]) -> str:
    return f"*{one['name']}* (no image)" if one["kind"] == "baseline" else f"`{one['name']}`"


def _value(figure: Mapping[str, Any], *, signed: bool = False) -> str:
    """`0.812 [0.79, 0.83]`; a dash where there is no figure."""
    if figure["value"] is None:
        return "-"
    sign = "+" if signed else ""
    ends = "" if figure["low"] is None else f" [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"
    return f"{figure['value']:{sign}.3f}{ends}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    yield line(heads)
    yield line(["---"] * len(heads))
    yield from (line(row) for row in rows)
    yield ""


def _pictures(pictures: Mapping[str, str], folder: str) -> list[str]:
    return [line for title, file in pictures.items() for line in (f"![{title}]({folder}/{file})", "")]
