"""Joining a Ray cluster, or starting one, without the noise."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray

from m3agiqa.errors import UserError

_IDLE_WORKER_MS = 60_000


def connect(address: str | None, cpus: int, *, verbose: bool = False) -> None:
    """Joins the cluster, or starts a local one that counts at least so many CPUs.

    Args:
        address: of the cluster, or `auto`; None: that of the Ray job this is, else a local one.

    Raises:
        UserError: if no cluster answers there.
    """
    quiet_libraries(verbose)
    if ray.is_initialized():
        return
    if not verbose:
        _hide_refusals()
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # "local", or a cluster that happens to run on this machine would be joined, and refuse num_cpus.
        address = "local"
        options |= local_cluster(cpus)
    try:
        with contextlib.nullcontext() if verbose else _muted_stderr():
            ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"ray.address={address}", f"no cluster answers ({error})", "check `ray status`, or leave it out"
        ) from None


def local_cluster(cpus: int) -> dict[str, Any]:
    """What `ray.init` is told to start a cluster of this machine alone that counts at least so many CPUs."""
    # Ray ends a worker that was idle for a second where there are more of them than CPUs, as there are where tasks
    # need a quarter of one each; and the next one imports everything again, which takes seconds of CPU.
    system = {"idle_worker_killing_time_threshold_ms": _IDLE_WORKER_MS}
    return {"num_cpus": counted_cpus(cpus), "include_dashboard": False, "_system_config": system}


def counted_cpus(cpus: int) -> int:
    """CPUs that a local cluster counts, which at least so many shall be: those of the machine may be fewer."""
    return max(os.cpu_count() or 1, cpus)


def quiet_libraries(verbose: bool) -> None:
    """Keeps the chatter of Ray, vLLM and transformers out of the way unless it is asked for."""
    if verbose:
        logging.getLogger("m3agiqa").setLevel(logging.DEBUG)
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"ray\..*")
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@functools.cache
def _hide_refusals() -> None:
    """Keeps Ray from printing, with a traceback, an error of ours that ended an actor: it is told in one line."""
    say: Callable[..., None] = ray._private.worker.print_to_stdstream

    def say_what_is_not_ours(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if lines := [line for line in data["lines"] if f"{UserError.__module__}." not in line]:
            say(data | {"lines": lines}, *args, **kwargs)

    ray._private.worker.print_to_stdstream = say_what_is_not_ours


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Ray's C++ side writes past Python's logging while it starts; what matters comes as an exception."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
