"""The README's way from human scores and a key to a scorer of one's own: its five commands, one after the other."""

import csv
import json
import shlex
from pathlib import Path

import pyarrow.dataset
import pytest
import ray

from m3agiqa.cli import main
from m3agiqa.seen import TRAIN, VALIDATION, read
from m3agiqa.tiny.opinions import training_pictures, write
from tests.distil.teacher_server import KEY, TeacherServer

ROOT = Path(__file__).parent.parent
COMMANDS = ("distil", "finetune", "capture", "train-predictor", "score")
SMALL = {
    "distil": ["teacher.base_url={url}"],
    "finetune": [
        "model.path=tiny", "model.dtype=float32", "compute.precision=fp32", "compute.gradient_checkpointing=false",
        "ray.workers=1", "optim.epochs=1", "optim.batch_size=8", "proof.engine=transformers", "proof.images=2",
        "proof.max_description_tokens=8",
    ],
    "capture": ["engine.kind=transformers", "scoring.max_description_tokens=8"],
    "train-predictor": ["head.width=16", "head.hidden=8", "optim.epochs=2", "calibration.share=0.5"],
    "score": ["engine.kind=transformers", "scoring.max_description_tokens=8"],
}  # fmt: skip
"""What makes the commands small enough for a test, and tells them where the teacher is."""


def lines() -> dict[str, str]:
    """The five commands as the README has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("in five commands", 1)[1].split("```")[1]
    found = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert [line.split()[1] for line in found] == list(COMMANDS)
    return dict(zip(COMMANDS, found, strict=True))


def words(line: str, more: list[str]) -> list[str]:
    """A command's arguments: the placeholders filled in, the configurations found, and `more` settings."""
    line = line.replace("BASE", "--config configs/tiny.yaml").replace("--input ...", "--input labelled.csv")
    line = line.replace("--output ...", "--output scores").replace("configs/", f"{ROOT}/configs/")
    return [*shlex.split(line)[1:], "--set", *more]


@pytest.fixture
def labelled(tmp_path):
    """`labelled.csv` with 24 pictures and the scores of their quality."""
    with write(tmp_path, training_pictures(24)).open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [{k: row[k] for k in ("image_path", "prompt")} | {"mos_column": row["true_quality"]} for row in rows]
    with (tmp_path / "labelled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)


@pytest.fixture
def ray_here(tmp_path, monkeypatch):
    """As in a shell: relative paths start where Ray is started, which the first command does."""
    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_five_commands_lead_from_scores_and_a_key_to_scores(tmp_path, labelled, ray_here, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with TeacherServer() as teacher:
        for name, line in lines().items():
            more = [setting.format(url=teacher.url) for setting in SMALL[name]]
            assert main(words(line, more)) == 0, capsys.readouterr()
    found = pyarrow.dataset.dataset("scores/scores").to_table().to_pylist()
    assert len(found) == 24
    assert {row["status"] for row in found} == {"ok"}
    # A score at the end of the scale is the end of its interval, which is never empty.
    assert all(row["quality_mos_low"] <= row["quality_mos"] <= row["quality_mos_high"] for row in found)
    assert all(row["quality_mos_low"] < row["quality_mos_high"] for row in found)
    # What the adapter was trained on is known to all that comes after it.
    ids = [row["id"] for row in found]
    for part, count in ((TRAIN, 21), (VALIDATION, 3)):
        learnt = read("adapter").met("id", ids, part)
        assert len(learnt) == count
        assert read("states").met("id", ids, part) == read("scores").met("id", ids, part) == learnt
        digests = {row["image_sha256"] for row in found if row["id"] in learnt}
        assert set(read("scores").met("image", list(digests), part)) == digests
    trained = json.loads((tmp_path / "predictor" / "predictor.json").read_text())["provenance"]
    assert "calibration images, so that intervals may be too narrow" in trained["notes"][-1]
    capsys.readouterr()
    evaluate = ["evaluate", "--scores", "scores", "--label", "quality=mos_column", "--out", "evaluation", "--no-plots"]
    assert main(evaluate) == 2
    (tmp_path / "predictor" / "trained_on.parquet").unlink()
    assert main(evaluate) == 2
    assert [line.partition(": was trained on ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "m3agiqa: predictor predictor", "m3agiqa: adapter of scores",
    ]  # fmt: skip
    # The adapter that was made is the one that scores.
    judged = json.loads((tmp_path / "scores" / "run.json").read_text())["fingerprint_parts"]["model"]
    assert set(judged["adapters"]) == {"quality", "correspondence", "authenticity"}
