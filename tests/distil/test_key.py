"""The teacher's key: what is said where it is missing, and that it is not written down."""

import json

import pytest

from tests.distil.distilling import ended, run, written
from tests.distil.teacher_server import KEY


def test_without_a_key_a_begun_output_says_what_is_there(teacher, labelled, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ended(teacher, labelled, out, "budget.max_requests=2")
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.delenv("TEACHER_KEY")
    cure = "export TEACHER_KEY=..., or set teacher.key_env (null: a server without one)"
    missing = f"TEACHER_KEY: is not set, and holds the teacher's key; {cure}"
    left = "2 descriptions are kept, 3 are left; the same command goes on"
    assert ended(teacher, labelled, out) == f"{missing}: {left}"
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # Nothing is there where nothing was begun.
    assert ended(teacher, labelled, tmp_path / "new") == missing
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("TEACHER_KEY", KEY)
    run(teacher, labelled, out)
    assert set(teacher.paid.values()) == {1}
    assert len(written(out)) == 5
    monkeypatch.delenv("TEACHER_KEY")
    assert ended(teacher, labelled, out) == f"{missing}: 5 descriptions are kept, 0 are left"


QUOTED = 'sk-"quoted"-0123456789'


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        (KEY, {"api_key": KEY}),
        (KEY, {"headers": [{"Authorization": f"Bearer {KEY}"}]}),
        (KEY, {KEY: 1}),
        (QUOTED, {"api_key": QUOTED}),
    ],
    ids=["value", "within", "name", "escaped"],
)
def test_a_key_among_the_further_fields_is_refused(teacher, labelled, tmp_path, monkeypatch, key, extra):
    monkeypatch.setenv("TEACHER_KEY", key)
    line = ended(teacher, labelled, tmp_path / "out", f"teacher.extra={json.dumps(extra)}")
    assert line.startswith("teacher.extra: holds the key of TEACHER_KEY, which would be written down; leave it out")
    assert key not in line
    assert not (tmp_path / "out").exists()
    assert not teacher.asks


def test_further_fields_without_the_key_are_sent(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", "teacher.extra={reasoning_effort: low}")
    assert {ask.body["reasoning_effort"] for ask in teacher.asks} == {"low"}
