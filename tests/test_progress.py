import io
import re
import time

import pytest

from m3agiqa.errors import UserError
from m3agiqa.progress import Board, Live, Rate, duration


def test_the_rate_is_that_of_the_last_minute_and_not_of_the_engines_start():
    rate = Rate(total=2000)
    for second in range(100):
        rate.update(float(second), 0)
    assert rate.per_second is None
    assert rate.eta_s is None
    done = 0
    for second in range(100, 300):
        done += 10 if second < 200 else 2
        rate.update(float(second), done)
    assert rate.per_second == pytest.approx(2.0)
    assert rate.eta_s == pytest.approx((2000 - 1200) / 2)


def test_the_board_adds_up_rows_and_takes_counters_as_they_stand():
    board = Board()
    assert board.snapshot() == {
        "statuses": {}, "engines": 0, "most_engines": 0, "engine_seconds": 0, "ready_at": None, "totals": {}
    }  # fmt: skip
    board.report("a", {}, {"tokens": 1.0})
    board.report("a", {"ok": 3, "rejected": 1}, {"tokens": 5.0})
    board.report("b", {"ok": 2}, {"tokens": 7.0})
    found = board.snapshot()
    assert found["statuses"] == {"ok": 5, "rejected": 1}
    assert (found["engines"], found["totals"]) == (2, {"tokens": 12.0})
    assert found["ready_at"] > 0


def test_what_an_engine_has_counted_stays_when_its_actor_is_started_anew():
    board = Board()
    for images in (5.0, 3.0, 2.0):
        board.started("a")
        assert board.snapshot()["engines"] == 0
        board.loaded("a")
        board.report("a", {"ok": 1}, {"images": 1.0})
        board.report("a", {"ok": 1}, {"images": images})
        assert board.snapshot()["engines"] == 1
    found = board.snapshot()
    assert (found["totals"], found["most_engines"]) == ({"images": 10.0}, 1)


def test_engines_are_counted_while_they_are_up_also_where_a_pool_grows_and_shrinks(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    board = Board()
    for actor in ("a", "b", "c"):
        board.started(actor)
        board.loaded(actor)
        board.report(actor, {"ok": 1}, {"images": 1.0})
        clock[0] += 10
        if actor != "c":
            board.left(actor)
    board.left("never up")
    found = board.snapshot()
    assert (found["engines"], found["most_engines"], found["engine_seconds"]) == (1, 1, 30.0)
    assert found["totals"] == {"images": 3.0}
    # Of an engine that died nobody knows when: it was up when it was last heard of.
    clock[0] += 100
    board.started("c")
    assert board.snapshot()["engine_seconds"] == 20.0


def test_a_run_is_stopped_where_too_many_rows_fail_but_not_by_its_first_few():
    board = Board(max_failed_fraction=0.2)
    board.report("a", {"ok": 39, "failed": 60}, {})
    assert board.refusal() is None
    assert board.enter("a", ["x"], False)
    board.report("a", {"ok": 1}, {})
    assert board.refusal().exit_code == 3
    assert "60 of 100 rows" in str(board.refusal())
    assert not board.enter("a", ["y"], False)


def test_failures_up_to_the_limit_do_not_stop_a_run():
    board = Board(max_failed_fraction=0.2)
    board.report("a", {"ok": 80, "failed": 20}, {})
    assert board.refusal() is None


def test_the_first_refusal_stays():
    board = Board()
    assert board.refusal() is None
    board.refuse(UserError("a", "b", "c"))
    board.refuse(UserError("d", "e", "f"))
    assert str(board.refusal()) == "a: b; c"


def test_off_a_terminal_there_are_plain_lines():
    board, stream = Board(), io.StringIO()
    with Live(board.snapshot, total=4, stream=stream):
        board.report("a", {"ok": 3, "rejected": 1}, {})
    lines = stream.getvalue().splitlines()
    assert lines
    assert re.fullmatch(r"\d\d:\d\d:\d\d 4/4 images, .*1 rejected", lines[-1])
    assert "\x1b" not in stream.getvalue()


def test_a_sign_of_life_does_not_end_the_run_it_reports_on():
    def broken() -> dict:
        raise ConnectionError("the cluster is gone")

    with Live(broken, total=1, stream=io.StringIO()) as live:
        pass
    assert live.last["statuses"] == {}


def test_durations():
    seconds = (0.4, 42, 200, 5 * 3600 + 420, 51 * 3600)
    assert [duration(s) for s in seconds] == ["0s", "42s", "3m 20s", "5h 07m", "2d 03h"]
