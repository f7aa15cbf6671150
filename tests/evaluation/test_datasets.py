"""Published data sets in their layouts, written here with made-up scores, and everything they are refused for."""

import csv

import numpy as np
import pytest
from scipy.io import savemat

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.evaluation import datasets


def write_csv(file, heads, rows):
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([heads, *rows])


def agiqa(folder, count=2982, quality="2.5"):
    heads = ("name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align")
    rows = [(f"sd1.5_lowstep_{i:04}.jpg", "a cat", "", "", "", quality, "0.3", "1.5", "0.3") for i in range(count)]
    write_csv(folder / "data.csv", heads, rows)


def test_agiqa_3k(tmp_path):
    agiqa(tmp_path)
    data = datasets.load("agiqa-3k", str(tmp_path))
    assert len(data.table) == 2982
    assert data.labels == {Aspect.QUALITY: "mos_quality", Aspect.CORRESPONDENCE: "mos_align"}
    assert data.table.strings("generator")[0] == "sd1.5_lowstep"
    assert data.table.keys("id")[7].as_py() == data.table.keys("image")[7].as_py() == "sd1.5_lowstep_0007.jpg"


def test_agiqa_3k_that_is_something_else(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        datasets.load("agiqa-3k", str(tmp_path))
    agiqa(tmp_path, count=10)
    with pytest.raises(UserError, match="10 rows, not the 2982"):
        datasets.load("agiqa-3k", str(tmp_path))
    agiqa(tmp_path, quality="50")
    with pytest.raises(UserError, match="2982 values of mos_quality"):
        datasets.load("agiqa-3k", str(tmp_path))
    write_csv(tmp_path / "data.csv", ("name", "prompt", "mos"), [("a.jpg", "x", "1")])
    with pytest.raises(UserError, match="mos_quality"):
        datasets.load("agiqa-3k", str(tmp_path))
    with pytest.raises(UserError, match="agiqa-3k, aigciqa2023, aigiqa-20k"):
        datasets.load("agiqa-2k", str(tmp_path))
    with pytest.raises(UserError, match="is no folder"):
        datasets.load("agiqa-3k", str(tmp_path / "none"))


def test_aigciqa2023(tmp_path):
    (tmp_path / "DATA" / "MOS").mkdir(parents=True)
    scores = {1: 40.0, 2: 50.0, 3: 60.0}
    for number, base in scores.items():
        savemat(str(tmp_path / "DATA" / "MOS" / f"mosz{number}.mat"), {"MOSz": base + np.arange(2400)[:, None] / 2400})
    data = datasets.load("aigciqa2023", str(tmp_path))
    assert data.scale == (0.0, 100.0)
    first = {aspect: data.table.numbers(column, "x")[0] for aspect, column in data.labels.items()}
    assert first == {Aspect.QUALITY: 40.0, Aspect.AUTHENTICITY: 50.0, Aspect.CORRESPONDENCE: 60.0}
    assert data.table.strings("generator")[399:401] == ["Controlnet", "DALLE"]
    assert "left out" in data.notes[1]
    write_csv(tmp_path / "AIGCIQA2023_Prompts.csv", ("number", "prompt"), [(i, f"prompt {i}") for i in range(100)])
    prompts = datasets.load("aigciqa2023", str(tmp_path)).table.strings("prompt")
    assert (prompts[0], prompts[3], prompts[4], prompts[404]) == ("prompt 0", "prompt 0", "prompt 1", "prompt 1")
    savemat(str(tmp_path / "DATA" / "MOS" / "mosz2.mat"), {"MOSz": np.ones((10, 1))})
    with pytest.raises(UserError, match="2400, 10, 2400"):
        datasets.load("aigciqa2023", str(tmp_path))
    savemat(str(tmp_path / "DATA" / "MOS" / "mosz2.mat"), {"other": np.ones((10, 1))})
    with pytest.raises(UserError, match="holds no MOSz"):
        datasets.load("aigciqa2023", str(tmp_path))


def test_aigiqa_20k(tmp_path):
    start = 0
    for split, count in (("train", 14_000), ("val", 2_000), ("test", 4_000)):
        rows = [(f"DALLE2_{start + i:05}.png", f"prompt {i % 50}", "2.25") for i in range(count)]
        write_csv(tmp_path / f"info_{split}.csv", ("name", "prompt", "mos"), rows)
        start += count
    data = datasets.load("aigiqa-20k", str(tmp_path))
    assert len(data.table) == 20_000
    assert data.labels == {Aspect.QUALITY: "mos"}
    assert data.table.strings("split")[13_999:14_001] == ["train", "val"]
    assert set(data.table.strings("generator")) == {"DALLE2"}
    write_csv(tmp_path / "info_val.csv", ("name", "prompt", "mos"), [("DALLE2_00001.png", "x", "1")] * 2000)
    with pytest.raises(UserError, match="DALLE2_00001"):
        datasets.load("aigiqa-20k", str(tmp_path))
