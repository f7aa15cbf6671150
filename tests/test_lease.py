"""One run at a time in a folder; a dead one's place is taken over."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from m3agiqa.errors import UserError
from m3agiqa.lease import Lease, read_holder
from m3agiqa.runs import LEASE, Output


@pytest.fixture
def output(tmp_path) -> Output:
    found = Output(str(tmp_path))
    found.make()
    return found


def leave_behind(output: Output, **changes: object) -> None:
    """The lease of a run that ended without removing it."""
    with Lease(output):
        holder = read_holder(output)
    output.write_whole(LEASE, json.dumps(dataclasses.asdict(holder) | changes).encode())


def test_a_lease_is_there_while_a_run_is_and_no_longer(output):
    with Lease(output):
        assert read_holder(output).is_here()
        assert read_holder(output).lives()
    assert read_holder(output) is None


def test_a_second_run_is_refused_and_the_first_keeps_its_lease(output):
    with Lease(output) as _:
        before = read_holder(output)
        with pytest.raises(UserError, match="another run is at work"), Lease(output):
            pass
        assert read_holder(output) == before


def test_a_process_that_is_gone_from_this_machine_is_taken_over_at_once(output):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leave_behind(output, process=f"{int(child.stdout)} 12345", beat_s=1000.0)
    with Lease(output):
        assert read_holder(output).lives()


def test_a_number_that_another_process_has_now_is_no_sign_of_life(output):
    import os

    leave_behind(output, process=f"{os.getpid()} 1", beat_s=1000.0)
    with Lease(output):
        pass


def test_a_holder_elsewhere_that_is_silent_is_taken_over(output):
    leave_behind(output, host="elsewhere", beat_s=0.2)
    with Lease(output):
        assert read_holder(output).is_here()


def test_a_holder_elsewhere_that_renews_is_not(output):
    """It is watched for long, but the first renewal decides."""
    with Lease(output, beat_s=0.1) as other:
        other._mine = dataclasses.replace(other._mine, host="elsewhere", beat_s=40.0)
        other._write()
        with pytest.raises(UserError, match="elsewhere"):
            Lease(output).__enter__()


def test_a_run_hears_that_another_has_taken_its_place(output):
    heard = []
    with Lease(output, beat_s=0.05) as lease:
        lease.on_lost = lambda: heard.append(True)
        thief = dataclasses.asdict(read_holder(output)) | {"token": "another"}
        # Again until it is seen: a renewal may be just about to be written.
        for _ in range(1200):
            output.write_whole(LEASE, json.dumps(thief).encode())
            if heard:
                break
            time.sleep(0.1)
    assert heard
    assert read_holder(output).token == "another", "it is not ours to remove"


def test_a_broken_lease_keeps_nobody_out(output):
    output.write_whole(LEASE, b'{"token": ')
    with Lease(output):
        pass
