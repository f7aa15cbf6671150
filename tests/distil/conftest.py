"""A labelled corpus, a teacher's server, and the key in the environment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpora import picture
from tests.distil.teacher_server import KEY, TeacherServer

SCORES = (0.41, 1.0, 2.37, 3.4, 4.86)
"""The quality scores of the corpus: one in each bin. Correspondence has them in reverse, the first of them missing."""


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    """A server that behaves well until it is told otherwise."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with TeacherServer() as server:
        yield server


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Five pictures of prompts p0 to p4 with scores."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    lines = ["id,image_path,prompt,generator,mos_quality,mos_align"]
    for i, score in enumerate(SCORES):
        picture(64, 48, seed=i).save(folder / f"{i}.png")
        align = "" if i == 0 else SCORES[-1 - i]
        lines.append(f"i{i},{i}.png,p{i},g,{score},{align}")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"
