"""Runs a distillation in this process as the command would, and reads what it wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.distil import distil
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.settings import load
from tests.corpora import rows_of
from tests.distil.teacher_server import KEY, TeacherServer

QUALITY = {Aspect.QUALITY: "mos_quality"}
BOTH = {**QUALITY, Aspect.CORRESPONDENCE: "mos_align"}


def settings(server: TeacherServer | str, *overrides: str) -> list[str]:
    """Overrides that name the server, wait next to nothing between tries, and ask one at a time."""
    url = server if isinstance(server, str) else server.url
    quick = ["limits.first_wait_s=0.001", "limits.concurrency=1", "limits.retries=2"]
    return [f"teacher.base_url={url}", "teacher.key_env=TEACHER_KEY", "teacher.timeout_s=20", *quick, *overrides]


def run(
    server: TeacherServer | str,
    corpus: Path,
    out: Path,
    *overrides: str,
    labels: dict[Aspect, str] = QUALITY,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Distils; the key must be in nothing that is written."""
    config = load(DistilConfig, None, settings(server, *overrides))
    try:
        return distil(config, str(corpus), str(out), labels, (0.0, 5.0), say=say)
    finally:
        assert_no_key(out)


def ended(server: TeacherServer | str, corpus: Path, out: Path, *overrides: str) -> str:
    """The one line that a distillation ends early with."""
    with pytest.raises(UserError) as caught:
        run(server, corpus, out, *overrides)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return str(caught.value)


def assert_no_key(folder: Path) -> None:
    """The key is in no file below a folder, nor in a file's name."""
    for path in folder.rglob("*") if folder.exists() else ():
        assert KEY not in str(path)
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def written(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of the output by id, read as a corpus."""
    return {row["id"]: row for row in rows_of(out)}
