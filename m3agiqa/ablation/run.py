"""`m3agiqa ablate`: every variation, seed by seed, then what holds up.

OUT/cells/*.json     each training that is done: the same command goes on
OUT/results.json     every variation with its figures, intervals and differences
OUT/results.parquet  a row a training
OUT/results.md       the table
OUT/states/          the inputs' states while it runs
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.cells import Cells, data_digest, decided_by
from m3agiqa.ablation.data import Input
from m3agiqa.ablation.inputs import open_inputs
from m3agiqa.ablation.learn import Learnt, Shown, learn
from m3agiqa.ablation.parts import Parts, assign, common_ids
from m3agiqa.ablation.report import Cell, results, write
from m3agiqa.ablation.variations import Variation, variations
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.metrics import agreement


def ablate(
    config: AblateConfig,
    uris: Mapping[str, str],
    out: Path,
    label: tuple[str, str],
    *,
    scale: tuple[float, float] = (0.0, 5.0),
    lm_head: LMHead | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compares variations of a predictor on captured sets.

    Args:
        uris: captured folders by name. label: an aspect and the column of its human scores.
        lm_head: of the states' model, for top-k logits. say: takes a line a training.

    Returns:
        What results.json holds.

    Raises:
        UserError: for inputs, labels, an output or a configuration that cannot be used; before any work is done.
    """
    chosen = variations(config, tuple(uris))
    used = {name for one in chosen for name in (one.trained_on, one.tested_on)}
    states = out / "states"
    wanted = {name: uri for name, uri in uris.items() if name in used}
    opened = open_inputs(wanted, label, scale, states, lm_head, config.measure.top_k)
    job = _Job(config, chosen, opened, scale, _digest(lm_head))
    for note in job.notes:
        say(f"note: {note}")
    cells = Cells(out)
    cells.prepare()
    try:
        done = job.train(cells, say)
    finally:
        shutil.rmtree(states, ignore_errors=True)
    found = results(config, done, job.labels, job.facts(label))
    write(out, found, done, job.labels)
    return found


class _Job:
    """What is compared, checked."""

    def __init__(
        self,
        config: AblateConfig,
        chosen: list[Variation],
        inputs: Mapping[str, Input],
        scale: tuple[float, float],
        lm_head: str | None,
    ) -> None:
        self._config, self._chosen, self._inputs = config, chosen, inputs
        self._scale, self._lm_head = scale, lm_head
        learnt = [inputs[name] for name in {one.trained_on: None for one in chosen}]
        tested = [inputs[name] for name in {one.tested_on: None for one in chosen}]
        self._parts = assign(list(inputs.values()), config, same_images=True)
        self._learnt = common_ids(learnt, self._parts, ("train", "val"), "--input")
        self._tested = common_ids(tested, self._parts, ("test",), "--input")
        for one in chosen:
            for name in (one.trained_on, one.tested_on):
                inputs[name].check(*one.shows)
        self._digest = data_digest(inputs, self._parts, self._learnt | self._tested, scale)
        self.labels = self._labels(chosen[0])
        self.notes = [*self._parts.notes, *(note for one in inputs.values() for note in one.conversations.notes)]

    def train(self, cells: Cells, say: Callable[[str], None]) -> list[Cell]:
        """Every variation with every seed; all variations of one seed before the next."""
        first, done = self._config.optim.seed, []
        for seed in range(first, first + self._config.measure.seeds):
            for variation in self._chosen:
                # By the two names, as the same set may be an input under several.
                trained, tested = self._inputs[variation.trained_on], self._inputs[variation.tested_on]
                inputs = {"trained on": trained, "tested on": tested}
                decides = decided_by(self._config, variation, seed, inputs, self._digest, self._lm_head)
                make = partial(self.learn, variation, seed)
                learnt, was_there = cells.take(f"{variation.name}-seed{seed}", decides, make)
                done.append(Cell(variation, seed, learnt))
                if not was_there:
                    say(f"seed {seed}, {variation.name}: {self._line(learnt)}")
        return done

    def learn(self, variation: Variation, seed: int) -> Learnt:
        """One training."""
        train, validation = (self._shown(variation, variation.trained_on, part) for part in ("train", "val"))
        test = self._shown(variation, variation.tested_on, "test")
        return learn(variation, seed, train, validation, {"test": test}, self._config, self._scale)

    def facts(self, label: tuple[str, str]) -> dict[str, Any]:
        """What the comparison was of."""
        used = self._learnt | self._tested
        held = {part: [self._parts.holds(one, part) for one in self._inputs.values()] for part in _PARTS}
        parts = {part: len(used & set().union(*ids)) for part, ids in held.items()}
        return {
            "label": {label[0]: label[1]},
            "scale": list(self._scale),
            "inputs": {name: one.source.uri for name, one in self._inputs.items()},
            "images": parts,
            "notes": self.notes,
        }

    def _shown(self, variation: Variation, name: str, part: str) -> Shown:
        return shown(self._inputs[name], variation, self._parts, part, self._learnt | self._tested)

    def _labels(self, base: Variation) -> torch.Tensor:
        one = self._inputs[base.tested_on]
        return one.labels[self._parts.places(one, "test", self._tested)]

    def _line(self, learnt: Learnt) -> str:
        [predictions] = learnt["predictions"].values()
        return f"{srcc_text(predictions, self.labels)}, {learnt['seconds']:g} s"


_PARTS = ("train", "val", "test")


def shown(one: Input, variation: Variation, parts: Parts, part: str, among: set[str] | None = None) -> Shown:
    """A part of an input as a variation shows it, with its labels."""
    places = parts.places(one, part, among)
    return Shown(one.shown(*variation.shows).take(places), one.labels[places])


def srcc_text(predictions: list[float], labels: torch.Tensor) -> str:
    """`SRCC 0.812`, or that there is none."""
    value = agreement(torch.tensor(predictions), labels)["srcc"]
    return "no SRCC, all predictions are equal" if value is None else f"SRCC {value:.3f}"


def _digest(lm_head: LMHead | None) -> str | None:
    if lm_head is None:
        return None
    return hashlib.sha256(lm_head.weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
