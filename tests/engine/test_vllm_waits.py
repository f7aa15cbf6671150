"""How the engine's processes on a CPU wait for each other: asleep, and without missing what they wait for."""

import importlib.util
import multiprocessing
import time
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

WAIT_S = 0.5
IN_A_ROW = 300


def reader(handle: Any, pipe: Any) -> None:
    """Waits for one message, then for many that come in a row; sends CPU seconds of the first wait, and the many."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from m3agiqa.engine.vllm_plugins import register

    register()
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    # From its first message on vLLM's own would look for the next without a pause.
    assert queue.dequeue() == "first"
    began = time.process_time()
    assert queue.dequeue() == "second"
    pipe.send(time.process_time() - began)
    pipe.send([queue.dequeue(timeout=60) for _ in range(IN_A_ROW)])


def test_a_process_of_the_engine_sleeps_until_it_is_told():
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    context = multiprocessing.get_context("spawn")
    queue = MessageQueue(n_reader=1, n_local_reader=1)
    ours, theirs = context.Pipe()
    process = context.Process(target=reader, args=(queue.export_handle(), theirs), name="EngineCore", daemon=True)
    process.start()
    queue.wait_until_ready()
    queue.enqueue("first")
    time.sleep(WAIT_S)
    queue.enqueue("second")
    assert ours.poll(60)
    assert ours.recv() < 0.2 * WAIT_S
    # So close to each other that vLLM drops notices: whoever waits for these alone takes half a minute.
    ends = time.monotonic() + 15
    for number in range(IN_A_ROW):
        queue.enqueue(number)
    assert ours.poll(max(0.0, ends - time.monotonic()))
    assert ours.recv() == list(range(IN_A_ROW))
    process.join(60)
