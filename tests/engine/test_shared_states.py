"""The hand-over through shared memory, without an engine."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m3agiqa.engine.shared_states import PREFIX, StatesInbox, StatesLost, remove_abandoned, write_failure, write_states


@pytest.fixture
def inbox(tmp_path):
    with StatesInbox(tmp_path) as inbox:
        yield inbox


def write(ticket, states, root):
    return write_states(ticket.name, *states.shape, states.dtype, lambda rows: rows.copy_(states), root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(inbox, tmp_path, dtype):
    states = torch.randn(37, 24).to(dtype)
    ticket = inbox.ask()
    assert write(ticket, states, tmp_path)
    taken = ticket.read()
    assert taken.dtype == dtype
    assert torch.equal(taken, states)
    assert [path.name for path in inbox.folder.iterdir()] == ["lock"]
    inbox.close()
    assert torch.equal(taken, states), "the tensor outlives the file and the inbox"


async def test_waits_for_a_late_writer(inbox, tmp_path):
    import asyncio

    ticket = inbox.ask()
    waiting = asyncio.create_task(ticket.receive(timeout_s=10))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    write(ticket, torch.ones(2, 3), tmp_path)
    assert torch.equal(await waiting, torch.ones(2, 3))


def test_says_so_when_nothing_comes(inbox):
    ticket = inbox.ask()
    started = time.monotonic()
    with pytest.raises(StatesLost, match=r"within 0.05 s.*extra_args"):
        ticket.read(timeout_s=0.05)
    assert time.monotonic() - started < 1
    with pytest.raises(StatesLost, match="taken, or called off"):
        ticket.read()


def test_failure_reaches_the_one_who_asked(inbox, tmp_path):
    ticket = inbox.ask()
    write_failure(ticket.name, "No space left on device", tmp_path)
    with pytest.raises(StatesLost, match="No space left on device"):
        ticket.read()


def test_failure_while_writing(inbox, tmp_path):
    def fail(rows):
        raise RuntimeError("half-way")

    ticket = inbox.ask()
    with pytest.raises(RuntimeError):
        write_states(ticket.name, 4, 4, torch.float32, fail, tmp_path)
    write_failure(ticket.name, "half-way", tmp_path)
    with pytest.raises(StatesLost, match="half-way"):
        ticket.read()


def test_closed_ticket_is_not_written(inbox, tmp_path):
    ticket = inbox.ask()
    ticket.close()
    ticket.close()
    assert not write(ticket, torch.ones(2, 3), tmp_path)
    write_failure(ticket.name, "too late", tmp_path)
    assert [path.name for path in inbox.folder.iterdir()] == ["lock"]


def test_ticket_closed_while_written(inbox, tmp_path):
    ticket = inbox.ask()
    assert write_states(ticket.name, 2, 3, torch.float32, lambda rows: ticket.close(), tmp_path)
    assert [path.name for path in inbox.folder.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", f"{PREFIX}1-a/../../x", f"{PREFIX}1-a/lock", ""])
def test_no_other_file_can_be_named(tmp_path, name):
    with pytest.raises(ValueError, match="no name of a ticket"):
        write_states(name, 1, 1, torch.float32, lambda rows: None, tmp_path)


def test_no_link_is_followed(inbox, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (inbox.folder / "7").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        write_states(f"{inbox.folder.name}/7", 1, 1, torch.float32, lambda rows: None, tmp_path)
    assert target.read_bytes() == b"mine"


def test_dead_process_is_cleaned_up_after_and_a_live_one_is_not(inbox, tmp_path):
    code = (
        "import sys, time, pathlib; from m3agiqa.engine.shared_states import StatesInbox\n"
        "inbox = StatesInbox(pathlib.Path(sys.argv[1])); inbox.ask(); print(inbox.folder, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    remove_abandoned(tmp_path)
    assert folder.is_dir()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with StatesInbox(tmp_path):
        assert not folder.exists()
        assert inbox.folder.exists()
