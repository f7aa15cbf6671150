"""The documentation is true: its commands and snippets run, its references are those of the code, its links lead on."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from m3agiqa.cli import main
from m3agiqa.reference import references
from tests.scored import scored_folder

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page that are marked as ones that run."""
    found = re.findall(rf"^```{language} run\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{page} has no block of {language} that runs"
    return found


def commands(page: str) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("name", sorted(references()))
def test_references_are_those_of_the_code(name):
    assert (DOCS / name).read_text(encoding="utf-8") == references()[name], "the code has changed: run `make docs`"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md"), key=str), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A folder with scores where the snippets look for them."""
    folder = tmp_path_factory.mktemp("docs")
    scored_folder(folder / "demo" / "run")
    return folder


@pytest.mark.parametrize("number", range(len(blocks("explore.md", "python"))))
def test_snippets_run(demo_run, monkeypatch, tmp_path, capsys, number):
    monkeypatch.chdir(demo_run)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    exec(compile(blocks("explore.md", "python")[number], "explore.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", commands("explore.md"))
def test_queries_run(demo_run, monkeypatch, capsys, command):
    monkeypatch.chdir(demo_run)
    program, *args = shlex.split(command)
    assert program == "m3agiqa"
    assert main(args) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_runs_as_it_stands(tmp_path):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for command in commands("quickstart.md"):
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "no report was made" not in done.stderr
    for left in ("run/report.html", "curated/report.html", "curated/removed.parquet"):
        assert (tmp_path / "demo" / left).stat().st_size > 0
    exported = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "demo" / "training-set"), cache_dir=str(tmp_path / "cache")
    )
    assert sum(part.num_rows for part in exported.values()) > 0
