"""The figures of a comparison: one JSON, one parquet, one table in markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from m3agiqa import __version__
from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.compare import FIGURES, Interval, difference, over_seeds
from m3agiqa.ablation.learn import Learnt
from m3agiqa.ablation.variations import Variation
from m3agiqa.predictor.metrics import Agreement, agreement


@dataclass(frozen=True)
class Cell:
    """One training of one variation."""

    variation: Variation
    seed: int
    learnt: Learnt

    @property
    def predictions(self) -> list[float]:
        """Of the test part."""
        [found] = self.learnt["predictions"].values()
        return found


def results(
    config: AblateConfig, cells: Sequence[Cell], labels: torch.Tensor, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Every variation with its figures over the seeds, and what it differs from the base by.

    Args:
        labels: [n] of the test part. facts: what the comparison was of.
    """
    chosen = list(dict.fromkeys(cell.variation for cell in cells))
    own = {one: [cell for cell in cells if cell.variation == one] for one in chosen}
    base = own[chosen[0]]
    rows = []
    for variation in chosen:
        tested = [_agreement(cell, labels) for cell in own[variation]]
        row = _row(config, variation, own[variation], tested)
        if variation.factor is not None:
            row["difference"] = _difference(config, own[variation], base, labels, len(chosen) - 1)
        rows.append(row)
    return {
        "m3agiqa": __version__,
        **facts,
        "config": config.model_dump(mode="json"),
        "test_images": len(labels),
        "variations": rows,
    }


def write(out: Path, found: Mapping[str, Any], cells: Sequence[Cell], labels: torch.Tensor) -> None:
    """Writes results.json, results.parquet and results.md into OUT."""
    write_whole(out / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    rows = [
        {
            "variation": cell.variation.name,
            **asdict(cell.variation),
            "seed": cell.seed,
            **{f"test_{name}": _agreement(cell, labels)[name] for name in FIGURES},  # type: ignore[literal-required]
            **{f"validation_{name}": cell.learnt["validation"][name] for name in FIGURES},  # type: ignore[literal-required]
            **{name: cell.learnt[name] for name in ("parameters", "seconds", "epochs", "best_epoch")},
        }
        for cell in cells
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "results.parquet")
    write_whole(out / "results.md", markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and how to read it."""
    config = found["config"]["measure"]
    lines = [
        "| variation | SRCC | PLCC | RMSE | parameters | seconds | SRCC against the base | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["variations"]:
        figures = " | ".join(interval_text(row["test"][name]) for name in ("srcc", "plcc", "rmse"))
        against = row.get("difference")
        tail = " | " if against is None else f"{_signed(against['over_seeds'])} | {against['verdict']}"
        seconds = row["seconds"]["mean"]
        lines.append(f"| {row['name']} | {figures} | {row['parameters']:,} | {seconds:.3g} | {tail} |")
    base = found["variations"][0]["value"]
    compared = len(found["variations"]) - 1
    return (
        "\n".join(lines)
        + f"\n\nBase: {base}. {found['test_images']} test images; mean over {config['seeds']} seeds with "
        f"its {config['level']:.0%} interval. A difference is better or worse where it leaves out 0 over the seeds and "
        f"over the images, at a level corrected for the {compared} that were looked at; else it is noise. Seconds are "
        "of a training, on the CPU unless there is a GPU.\n"
    ) + "".join(f"\nNote: {note}.\n" for note in found["notes"])


def write_whole(file: Path, text: str) -> None:
    """Writes a file such that a reader never sees half of it."""
    half = file.with_name(f"{file.name}.new")
    half.write_text(text, encoding="utf-8")
    half.replace(file)


def interval_text(one: Interval) -> str:
    """`0.812 [0.806, 0.818]`, or a dash."""
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _signed(one: Interval) -> str:
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def _agreement(cell: Cell, labels: torch.Tensor) -> Agreement:
    return agreement(torch.tensor(cell.predictions, dtype=torch.float64), labels)


def _row(
    config: AblateConfig, variation: Variation, cells: Sequence[Cell], tested: Sequence[Agreement]
) -> dict[str, Any]:
    level = config.measure.level
    return {
        "name": variation.name,
        "factor": variation.factor,
        "value": variation.value,
        "test": {name: over_seeds([one[name] for one in tested], level) for name in FIGURES},  # type: ignore[literal-required]
        "by_seed": [{"seed": cell.seed, **one} for cell, one in zip(cells, tested, strict=True)],
        "parameters": cells[0].learnt["parameters"],
        "seconds": over_seeds([cell.learnt["seconds"] for cell in cells], level),
    }


def _difference(
    config: AblateConfig, own: Sequence[Cell], base: Sequence[Cell], labels: torch.Tensor, comparisons: int
) -> dict[str, Any]:
    srcc = [[_agreement(cell, labels)["srcc"] for cell in cells] for cells in (own, base)]
    first, second = (np.array([cell.predictions for cell in cells]) for cells in (own, base))
    measure = config.measure
    return dict(
        difference(
            srcc[0],
            srcc[1],
            (first, second),
            labels.double().numpy(),
            level=measure.level,
            comparisons=comparisons,
            resamples=measure.resamples,
            seed=measure.split_seed,
        )
    )
