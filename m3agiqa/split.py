"""Makes a split: a file of rows and their parts, and beside it what the parts hold and share.

FILE                    parquet or CSV; `id`, `image` (its file's name, by which rows without ids are found), `part`
FILE.json               how it was made, rows and human scores by part, shared prompts, generators and near duplicates
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from m3agiqa.corpus.files import local_out
from m3agiqa.errors import UserError
from m3agiqa.evaluation import datasets, overlap, splits
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.evaluation.tables import Table, match, read


@dataclass(frozen=True)
class SplitRequest:
    """What `m3agiqa split` was asked; the names of its options."""

    input: str
    out: str
    by: str = "prompt"
    dataset: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: {"train": 0.8, "test": 0.2})
    folds: int | None = None
    official: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None
    seed: int = 0
    images: bool = True
    distance: int = overlap.NEAR
    id_column: str = "id"


def split(request: SplitRequest) -> dict[str, Any]:
    """Splits and writes.

    Returns:
        What FILE.json holds.

    Raises:
        UserError: for input that cannot be split as asked, and a file that is there already.
    """
    out = _out_file(request.out)
    table, label = _table(request)
    ids = [str(one) for one in table.strings("id")]
    labels = None if label is None else table.numbers(label, f"--label {label}")
    parts = _parts(request, table, ids, labels)
    content = {
        "input": request.input,
        "dataset": request.dataset,
        "by": request.by,
        "seed": None if request.by == "official" else request.seed,
        "label": label,
        "parts": splits.describe(parts, labels),
        "shared_prompts": overlap.shared(parts, table.strings("prompt")),
        "shared_generators": overlap.shared(parts, table.strings("generator")),
        "near_duplicates": _near(request, ids, parts),
    }
    _write(out, table, parts, content)
    return content


def _table(request: SplitRequest) -> tuple[Table, str | None]:
    """The rows, and the column of labels to stratify by."""
    if request.dataset is None:
        return read(request.input, "--input", request.id_column), request.label
    data = datasets.load(request.dataset, request.input, "--input")
    return data.table, request.label or next(iter(data.labels.values()))


def _parts(request: SplitRequest, table: Table, ids: list[str], labels: Floats | None) -> list[str | None]:
    if request.by == "official":
        return _official(request, table)
    shares = dict(request.shares)
    if request.folds is not None:
        if request.folds < 2:
            raise UserError(f"--folds {request.folds}", "is no split", "give 2 or more")
        shares = {f"fold-{i}": 1 / request.folds for i in range(request.folds)}
    groups = splits.groups_of(request.by, ids, table.strings("prompt"), table.strings("generator"))
    return list(splits.deal(groups, shares, labels, request.seed))


def _official(request: SplitRequest, table: Table) -> list[str | None]:
    """Parts of published files, each of which names the images of one; or of the column `split`."""
    if not request.official:
        table.need("split", "--by official")
        return splits.official(table.strings("split"), "--by official")
    parts: list[str | None] = [None] * len(table)
    for part, uri in request.official.items():
        listed = read(uri, f"--official {part}=", request.id_column)
        places, _ = match(table, listed)
        if (count := int((places >= 0).sum())) < len(listed):
            rule = f"{len(listed) - count} of its {len(listed)} rows are not in {request.input}"
            raise UserError(f"--official {part}={uri}", rule, "give the split of this very data set")
        for row in np.flatnonzero(places >= 0).tolist():
            if parts[row] is not None:
                rule = f"{table.rows['id'][row]} is in {parts[row]} already"
                raise UserError(f"--official {part}={uri}", rule, "give each row one part")
            parts[row] = part
    return parts


def _near(request: SplitRequest, ids: list[str], parts: list[str | None]) -> dict[str, Any]:
    """Near-duplicate images of different parts, or why they were not looked for."""
    if not request.images or request.dataset is not None:
        why = "not asked for" if not request.images else "a data set's table names no images that can be read"
        return {"distance": None, "reason": why}
    try:
        hashes, failed = overlap.hashes(request.input, request.id_column)
    except UserError as error:
        return {"distance": None, "reason": f"the images cannot be opened ({error.rule})"}
    if not hashes:
        return {"distance": None, "reason": f"none of {failed} images can be read"}
    pairs = overlap.near_duplicates(ids, parts, hashes, request.distance)
    return {"distance": request.distance, "unreadable": failed, "parts": pairs}


def _out_file(out: str) -> Path:
    file = local_out(out, "give a local file")
    if file.suffix not in (".parquet", ".csv"):
        raise UserError(f"--out {out}", "is neither .parquet nor .csv", "name such a file")
    for one in (file, _sheet(file)):
        if one.exists():
            raise UserError(f"--out {out}", f"{one.name} is there already", "give a new file: a split is for keeps")
    return file


def _sheet(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _write(out: Path, table: Table, parts: list[str | None], content: dict[str, Any]) -> None:
    columns = {"id": table.keys("id"), "image": table.keys("image"), "part": pa.array(parts, pa.string())}
    rows = pa.table(columns).filter(pc.field("part").is_valid()).sort_by("id")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.new")
    if out.suffix == ".csv":
        csv.write_csv(rows, work)
    else:
        pq.write_table(rows, work)
    _sheet(out).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    work.rename(out)


def summary(content: Mapping[str, Any]) -> list[str]:
    """What a split holds and shares, in a line for each."""
    lines = []
    for part, found in content["parts"].items():
        label = "" if found["mean_label"] is None else f", mean {content['label']} {found['mean_label']:.3f}"
        lines.append(f"{part}: {found['rows']} rows{label}")
    for kind in ("prompts", "generators"):
        for pair, one in content[f"shared_{kind}"].items():
            if one["of"]:
                there, here = pair.split(", ")
                lines.append(f"{one['shared']} of {one['of']} {kind} of {here} are also in {there}")
    near = content["near_duplicates"]
    if near["distance"] is None:
        lines.append(f"near-duplicate images: not looked for ({near['reason']})")
        return lines
    for pair, one in near["parts"].items():
        lines.append(f"near-duplicate images of {pair}: {one['pairs']} pairs within {near['distance']} bits")
    return lines
