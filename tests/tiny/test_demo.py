"""The demo corpus: enough of it, whole, and quick to make."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from m3agiqa.tiny import demo
from m3agiqa.tiny.corpus import TRAINING_PHOTOGRAPHS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    manifest = demo.write(tmp_path_factory.mktemp("demo"))
    with manifest.open(newline="") as file:
        return manifest.parent, list(csv.DictReader(file))


def test_every_row_has_a_picture_that_opens(corpus):
    folder, rows = corpus
    assert len(rows) >= 24
    assert len({row["image_path"] for row in rows}) == len(rows)
    for row in rows:
        assert tuple(row) == demo.COLUMNS
        assert all(row.values())
        with Image.open(folder / row["image_path"]) as image:
            image.load()
            assert image.mode == "RGB"
            assert max(image.size) <= 512


def test_the_kinds_of_pictures(corpus):
    _, rows = corpus
    generators = [row["generator"] for row in rows]
    assert generators.count("photograph") == 6
    assert generators.count("rendered") >= 6
    assert sum(g.startswith("degraded:") for g in generators) >= 6
    assert sum(row["case"].startswith("wrong") for row in rows) == 2


def test_nothing_of_it_was_trained_on():
    trained = {Path(name).stem for names in TRAINING_PHOTOGRAPHS.values() for name in names}
    assert "brick" in trained
    # Under their own names, and under those that they have in the packages that they come from.
    assert not trained & {Path(name).stem for name in demo._PHOTOGRAPHS}
    assert not trained & {"astronaut", "chelsea", "coffee", "rocket", "china", "flower"}


def test_photographs_are_small_and_credited():
    from importlib.resources import files

    folder = files("m3agiqa.tiny") / "photos"
    credits = (folder / "CREDITS.md").read_text()
    shipped = [entry for entry in folder.iterdir() if entry.name.endswith(".jpg")]
    assert {entry.name for entry in shipped} == set(demo._PHOTOGRAPHS)
    for entry in shipped:
        assert len(entry.read_bytes()) < 80_000
        assert f"`{entry.name}`" in credits


def test_the_demo_needs_neither_torch_nor_scikit_image():
    code = (
        "import sys, m3agiqa.tiny.demo as d; d.rows(); print({'torch', 'skimage', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
