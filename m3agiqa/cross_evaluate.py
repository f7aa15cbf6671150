"""`m3agiqa cross-evaluate`: a predictor trained on each captured set, tested on every one.

All images are split together, by one rule: a prompt that is in two sets is in the same part in both, so that no
predictor has seen a test prompt of another set.

OUT/cells/*.json   each training that is done: the same command goes on
OUT/matrix.json    every pair of sets with its figures and intervals
OUT/matrix.md      the table
OUT/matrix.png     the same as a heat map of SRCC
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3agiqa import __version__
from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.cells import Cells, data_digest, decided_by
from m3agiqa.ablation.compare import FIGURES, over_seeds
from m3agiqa.ablation.data import Input
from m3agiqa.ablation.inputs import open_inputs
from m3agiqa.ablation.learn import Learnt, learn
from m3agiqa.ablation.parts import Parts, assign, common_ids
from m3agiqa.ablation.report import interval_text, write_whole
from m3agiqa.ablation.run import shown
from m3agiqa.ablation.variations import Variation, base_of
from m3agiqa.errors import UserError
from m3agiqa.predictor.metrics import agreement


def cross_evaluate(
    config: AblateConfig,
    uris: Mapping[str, str],
    out: Path,
    label: tuple[str, str],
    *,
    scale: tuple[float, float] = (0.0, 5.0),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the base of the configuration on each set and tests it on every one.

    Args:
        uris: captured folders by name. label: an aspect and the column of its human scores, in all sets.
        scale: of the labels of all sets. say: takes a line a training.

    Returns:
        What matrix.json holds.

    Raises:
        UserError: for inputs, labels, an output or a configuration that cannot be used; before any work is done.
    """
    if len(uris) < 2:
        raise UserError("--input", "names one set", "give two or more, each as NAME=FOLDER")
    if config.base.descriptions or config.base.capture == "top_k":
        raise UserError(
            "base", "sets descriptions or capture=top_k, which are for ablate", "leave them out: all sets are used"
        )
    inputs = open_inputs(uris, label, scale, out / "states")
    variation = base_of(config, tuple(uris))
    parts = assign(list(inputs.values()), config, same_images=False)
    for one in inputs.values():
        one.check(*variation.shows)
        common_ids([one], parts, ("train", "val", "test"), f"--input {one.name}")
    notes = [*parts.notes, *(f"{one.name}: {note}" for one in inputs.values() for note in one.conversations.notes)]
    for note in notes:
        say(f"note: {note}")
    cells = Cells(out)
    cells.prepare()
    try:
        trained = _train(config, variation, inputs, parts, scale, cells, say)
    finally:
        shutil.rmtree(out / "states", ignore_errors=True)
    facts = {"label": {label[0]: label[1]}, "scale": list(scale), "notes": notes, "base": variation.value}
    found = _matrix(config, trained, inputs, parts, facts)
    write_whole(out / "matrix.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "matrix.md", markdown(found))
    _draw(found, out / "matrix.png")
    return found


def _train(
    config: AblateConfig,
    variation: Variation,
    inputs: Mapping[str, Input],
    parts: Parts,
    scale: tuple[float, float],
    cells: Cells,
    say: Callable[[str], None],
) -> dict[str, list[Learnt]]:
    """By the name of the training set, a training for each seed."""
    digest = data_digest(inputs, parts, None, scale)
    tests = {name: shown(one, variation, parts, "test") for name, one in inputs.items()}
    trained: dict[str, list[Learnt]] = {name: [] for name in inputs}
    first = config.optim.seed
    for seed in range(first, first + config.measure.seeds):
        for name, one in inputs.items():
            train, validation = (shown(one, variation, parts, part) for part in ("train", "val"))
            decides = decided_by(config, variation, seed, inputs, digest, None) | {"trained_on": name}
            make = partial(learn, variation, seed, train, validation, tests, config, scale)
            learnt, was_there = cells.take(f"{name}-seed{seed}", decides, make)
            trained[name].append(learnt)
            if not was_there:
                say(f"seed {seed}, trained on {name}: {learnt['seconds']:g} s")
    return trained


def _matrix(
    config: AblateConfig,
    trained: Mapping[str, list[Learnt]],
    inputs: Mapping[str, Input],
    parts: Parts,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    pairs = []
    for name, learnt in trained.items():
        for other, one in inputs.items():
            labels = one.labels[parts.places(one, "test")]
            found = [agreement(torch.tensor(run["predictions"][other], dtype=torch.float64), labels) for run in learnt]
            figures = {
                figure: over_seeds([run[figure] for run in found], config.measure.level)  # type: ignore[literal-required]
                for figure in FIGURES
            }
            pairs.append({"trained_on": name, "tested_on": other, "test_images": len(labels), "test": figures})
    trainings = {name: {"images": len(parts.places(inputs[name], "train"))} for name in trained}
    return {
        "m3agiqa": __version__,
        **facts,
        "config": config.model_dump(mode="json"),
        "inputs": {name: {"uri": one.source.uri, **trainings[name]} for name, one in inputs.items()},
        "pairs": pairs,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """SRCC of each pair: a row for each set that is trained on, a column for each that is tested on."""
    names = list(found["inputs"])
    cells = {(one["trained_on"], one["tested_on"]): interval_text(one["test"]["srcc"]) for one in found["pairs"]}
    lines = [f"| trained on | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    lines += [f"| {name} | {' | '.join(cells[name, other] for other in names)} |" for name in names]
    measure = found["config"]["measure"]
    told = f"SRCC on the test part of each set; mean over {measure['seeds']} seeds, {measure['level']:.0%} interval."
    notes = "".join(f"\nNote: {note}.\n" for note in found["notes"])
    return "\n".join(lines) + f"\n\n{told} Predictor: {found['base']}.\n{notes}"


def _draw(found: Mapping[str, Any], file: Path) -> None:
    """The matrix as a heat map; a pair without a correlation is left white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(found["inputs"])
    at = {(one["trained_on"], one["tested_on"]): one["test"]["srcc"]["mean"] for one in found["pairs"]}
    values = [[at[name, other] for other in names] for name in names]
    size = 2.5 + 0.9 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown_values = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(shown_values, cmap="viridis", vmin=-1 if min(map(min, shown_values)) < 0 else 0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tested on", ylabel="trained on", title="SRCC")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if value is not None and value < 0.7 else "black"
            axes.text(x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image)
    figure.savefig(file, dpi=120)
