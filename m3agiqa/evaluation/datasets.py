"""Published data sets as tables of human scores, in the layouts they are published in, with checks.

A general one is any table with image and score columns: it needs no loader.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.io import loadmat

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.evaluation.tables import Table, read, refuse_duplicates


@dataclass(frozen=True)
class DataSet:
    """A data set's human scores.

    Attributes:
        table: a row an image; `id` and `image` are the image's file name. labels: aspect -> its column.
        scale: that the scores are published on. notes: what a reader of figures on it should know.
    """

    table: Table
    labels: dict[Aspect, str]
    scale: tuple[float, float]
    notes: tuple[str, ...]


def load(name: str, folder: str, flag: str = "--truth") -> DataSet:
    """Loads `agiqa-3k`, `aigciqa2023` or `aigiqa-20k` from its folder.

    Args:
        flag: the option that names the folder, for errors.

    Raises:
        UserError: for an unknown name, files that are missing, and content that is not that of the data set.
    """
    if name not in _LOADERS:
        raise UserError(f"--dataset {name}", "is not known", f"take one of {', '.join(_LOADERS)}, or give --label")
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}", "is no folder", f"give the folder of {name}")
    return _LOADERS[name](Path(folder), flag)


def _agiqa_3k(folder: Path, flag: str) -> DataSet:
    """`data.csv` (Li et al., arXiv 2306.04717): 2,982 images; a generator is a model with its setting."""
    table = _csv(folder / "data.csv", flag, ("name", "prompt", "mos_quality", "mos_align"))
    _expect(f"{flag} {folder}", table, 2982, {"mos_quality": (0, 5), "mos_align": (0, 5)})
    names = table.keys("image").to_pylist()
    generators = [re.sub(r"_\d+\.\w+$", "", name) for name in names]
    notes = ("the published correspondence words of this data set are those of mos_quality: they are not used",)
    labels = {Aspect.QUALITY: "mos_quality", Aspect.CORRESPONDENCE: "mos_align"}
    return DataSet(_named(table, names, generators), labels, (0.0, 5.0), notes)


_AIGCIQA_FILES = {Aspect.QUALITY: "mosz1", Aspect.AUTHENTICITY: "mosz2", Aspect.CORRESPONDENCE: "mosz3"}
_AIGCIQA_GENERATORS = ("Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser")


def _aigciqa2023(folder: Path, flag: str) -> DataSet:
    """`DATA/MOS/mosz1.mat`, 2 and 3 (Wang et al., arXiv 2307.00211): six generators, each 100 prompts four times.

    The order of the files is that of its README, quality, authenticity, correspondence; it is not the paper's.
    """
    columns: dict[str, Any] = {}
    for aspect, stem in _AIGCIQA_FILES.items():
        file = folder / "DATA" / "MOS" / f"{stem}.mat"
        try:
            columns[f"mos_{aspect}"] = np.asarray(loadmat(str(file))["MOSz"], np.float64).ravel()
        except (OSError, KeyError, ValueError, NotImplementedError) as error:
            raise UserError(str(file), f"holds no MOSz ({error})", "give the folder of AIGCIQA2023") from None
    names = [f"{i}.png" for i in range(2400)]
    if any(len(values) != len(names) for values in columns.values()):
        counts = ", ".join(str(len(values)) for values in columns.values())
        raise UserError(f"{flag} {folder}", f"holds {counts} scores, not 2400 each", "give the whole data set")
    prompts = _aigciqa_prompts(folder, flag)
    made = {
        "id": names,
        "image": [f"Image/allimg/{name}" for name in names],
        "prompt": pa.array([prompts[i % 400 // 4] if prompts else None for i in range(2400)], pa.string()),
        "generator": [_AIGCIQA_GENERATORS[i // 400] for i in range(2400)],
    }
    table = Table(f"{flag} {folder}", pa.table(made | columns), True)
    _expect(f"{flag} {folder}", table, 2400, dict.fromkeys(columns, (0.0, 100.0)))
    missing = () if prompts else ("AIGCIQA2023_Prompts.csv is not there: figures by prompt are left out",)
    notes = ("mosz1 is quality, mosz2 authenticity and mosz3 correspondence", *missing)
    return DataSet(table, {aspect: f"mos_{aspect}" for aspect in _AIGCIQA_FILES}, (0.0, 100.0), notes)


def _aigciqa_prompts(folder: Path, flag: str) -> list[str]:
    """The 100 prompts, from the published sheet saved as CSV (with the column `prompt`); none where it is not there."""
    file = folder / "AIGCIQA2023_Prompts.csv"
    if not file.is_file():
        return []
    prompts = [str(one) for one in _csv(file, flag, ("prompt",)).strings("prompt")]
    if len(prompts) != 100:
        raise UserError(str(file), f"holds {len(prompts)} prompts, not 100", "save the published sheet as CSV again")
    return prompts


def _aigiqa_20k(folder: Path, flag: str) -> DataSet:
    """`info_train.csv`, `info_val.csv`, `info_test.csv` (Li et al., arXiv 2404.03407): 14,000, 2,000 and 4,000 rows."""
    parts = []
    for split, count in (("train", 14_000), ("val", 2_000), ("test", 4_000)):
        table = _csv(folder / f"info_{split}.csv", flag, ("name", "mos"))
        _expect(f"{flag} {folder}", table, count, {"mos": (0, 5)})
        rows = table.rows.select(["image", "prompt", "generator", "mos"])
        parts.append(rows.append_column("split", pa.array([split] * len(table))))
    table = Table(f"{flag} {folder}", pa.concat_tables(parts, promote_options="permissive"), True)
    names = table.keys("image").to_pylist()
    generators = [
        given or re.sub(r"_?\d+\.\w+$", "", n) for given, n in zip(table.strings("generator"), names, strict=True)
    ]
    notes = ("its one score weighs quality and correspondence together; it is taken as that of quality",)
    return DataSet(_named(table, names, generators), {Aspect.QUALITY: "mos"}, (0.0, 5.0), notes)


_LOADERS: dict[str, Callable[[Path, str], DataSet]] = {
    "agiqa-3k": _agiqa_3k,
    "aigciqa2023": _aigciqa2023,
    "aigiqa-20k": _aigiqa_20k,
}


def _csv(file: Path, flag: str, needed: tuple[str, ...]) -> Table:
    if not file.is_file():
        raise UserError(str(file), "is not there", "give the folder as it is published")
    table = read(str(file), flag, image_column="name" if "name" in needed else None)
    for column in needed:
        if column != "name":
            table.need(column, str(file))
    return table


def _named(table: Table, names: list[str], generators: list[str]) -> Table:
    """The table with file names as ids."""
    rows = table.rows.drop_columns([name for name in ("id", "generator") if name in table.rows.column_names])
    rows = rows.append_column("id", pa.array(names)).append_column("generator", pa.array(generators))
    made = Table(table.said, rows, True)
    refuse_duplicates(made.keys("id"), table.said)
    return made


def _expect(said: str, table: Table, count: int, ranges: dict[str, tuple[float, float]]) -> None:
    """Refuses a table of another length, with scores missing or beyond their range."""
    if len(table) != count:
        rule = f"{table.said} has {len(table)} rows, not the {count} of the data set"
        raise UserError(said, rule, "give the whole data set, or its table with --label")
    for column, (low, high) in ranges.items():
        values = table.numbers(column, said)
        if wrong := int((~((values >= low) & (values <= high))).sum()):
            rule = f"{wrong} values of {column} are missing or outside {low:g} to {high:g}"
            raise UserError(said, rule, "give the data set as it is published")
