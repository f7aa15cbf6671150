"""What a run asks of a cluster: CPUs, GPUs, actors, room for what is on its way."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext, ExecutionResources

from m3agiqa.config import RunConfig
from m3agiqa.driver_memory import hold_back
from m3agiqa.errors import UserError

_POLL_S = 1.0
# Of the resource that `ray.decode_on` names; how many tasks a node has room for is said by its CPUs.
_A_LITTLE = 0.001


def actor_pool(config: RunConfig) -> ray.data.ActorPoolStrategy:
    """The pool of engine actors: it grows while batches wait, from the fewest to the most, and shrinks again."""
    low, high = actors(config)
    at_once = 1 if config.engine.kind == "transformers" else config.ray.batches_in_flight
    return ray.data.ActorPoolStrategy(
        min_size=low,
        max_size=high,
        max_tasks_in_flight_per_actor=at_once + 1,
        max_concurrent_calls_per_actor=at_once,
    )


def actors(config: RunConfig) -> tuple[int, int]:
    """The fewest and the most engine actors."""
    return config.ray.actors if isinstance(config.ray.actors, tuple) else (config.ray.actors, config.ray.actors)


def decode_args(config: RunConfig) -> dict[str, Any]:
    """What a decoding task asks for, as arguments of `map_batches`."""
    # Ray Data fuses neighbours that ask for the same; decoding would then wait for the engine in its actor.
    same = config.ray.decode_cpus == config.ray.num_cpus
    args: dict[str, Any] = {"num_cpus": config.ray.decode_cpus + (0.001 if same else 0.0)}
    return args if config.ray.decode_on is None else args | {"resources": {config.ray.decode_on: _A_LITTLE}}


def set_limits(context: DataContext, config: RunConfig) -> None:
    """Tells Ray Data what a run may take of the cluster, and when its pool of engines grows.

    Ray Data starts no task whose output has no room in its share of the object store: what is on its way between
    decoding and a slow engine stays below that, or below `ray.object_store_gib`; `driver_memory.py` bounds its blocks.
    """
    hold_back(context)
    if (most := config.ray.object_store_gib) is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=most * 2**30)
    # Grow once every place of every engine is taken. Ray's own threshold, 1.75 batches for each place, is never
    # reached where actors take one batch more than they have places: a pool would stay at its fewest for ever.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0


def check_resources(config: RunConfig) -> None:
    """Refuses what no node of the cluster has: it would be waited for in silence.

    Waits `ray.wait_s` for such a node, and asks a cluster that can grow for one.

    Raises:
        UserError: naming what is asked for and what there is, or sizes that do not go together.
    """
    check_gpus(config)
    ends = time.monotonic() + config.ray.wait_s
    asked = False
    try:
        while (lacking := missing(config, nodes())) is not None:
            if time.monotonic() >= ends:
                raise lacking
            if not asked:
                request_resources(bundles=[_bundle(config, nodes())])
                asked = True
            time.sleep(_POLL_S)
    finally:
        if asked:
            request_resources(bundles=[])


def nodes() -> list[Mapping[str, float]]:
    """What each node of the cluster has, by the names of resources."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def missing(config: RunConfig, there: Sequence[Mapping[str, float]]) -> UserError | None:
    """What no node has for an actor or a decoding task, as the error that says so.

    Args:
        there: the nodes, as `nodes` gives them.
    """
    needs = [("CPU", "ray.num_cpus", config.ray.num_cpus), ("CPU", "ray.decode_cpus", config.ray.decode_cpus)]
    needs.append(("GPU", "ray.num_gpus", gpus(config, there) or 0.0))
    for resource, key, wanted in needs:
        most = max((node.get(resource, 0.0) for node in there), default=0.0)
        if wanted > most:
            rule = f"no node of the cluster has more than {most:g} {resource}s"
            cure = "ask for fewer, or wait for a node: --set ray.wait_s=600"
            return UserError(f"{key}={wanted:g}", rule, cure)
    if (name := config.ray.decode_on) is not None and not any(node.get(name) for node in there):
        cure = "start one with --resources, or wait for it: --set ray.wait_s=600"
        return UserError(f"ray.decode_on={name}", "no node of the cluster has that resource", cure)
    whole = _bundle(config, there)
    if not any(all(node.get(name, 0.0) >= much for name, much in whole.items()) for node in there):
        shown = " and ".join(f"{much:g} {name}s" for name, much in whole.items())
        return UserError("ray.actors", f"no node has both {shown} for one", "ask for fewer: ray.num_cpus, ray.num_gpus")
    return None


def _bundle(config: RunConfig, there: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What one engine actor needs of one node."""
    wanted = {"CPU": config.ray.num_cpus, "GPU": gpus(config, there) or 0.0}
    return {name: much for name, much in wanted.items() if much}


def check_gpus(config: RunConfig) -> None:
    """Refuses GPU numbers that Ray or the engine cannot take.

    Raises:
        UserError: a fraction above one, fewer than the engine's tensor parallelism, or engines that would not fit
            beside each other on one GPU.
    """
    asked, together = config.ray.num_gpus, config.engine.tensor_parallel_size
    if asked is None or config.engine.kind == "simulated":
        return
    if asked > 1 and asked != int(asked):
        raise UserError(f"ray.num_gpus={asked:g}", "above one GPU only whole ones are given", "round it up")
    if together > 1 and asked != together:
        rule = f"engine.tensor_parallel_size={together} needs as many GPUs in one actor"
        raise UserError(f"ray.num_gpus={asked:g}", rule, f"use {together}, or leave it out")
    share = config.engine.gpu_memory_utilization
    if config.engine.kind == "vllm" and 0 < asked < 1 and share > asked:
        rule = f"each engine on the shared GPU would take {share:g} of its memory"
        cure = f"lower that share too: --set engine.gpu_memory_utilization={asked * 0.9:.2g}"
        raise UserError(f"ray.num_gpus={asked:g}", rule, cure)


def gpus(config: RunConfig, there: Sequence[Mapping[str, float]]) -> float | None:
    """GPUs of an engine actor; None: none are asked for, as no node has any, or the engine has no use for them."""
    if config.ray.num_gpus is not None:
        return config.ray.num_gpus
    if config.engine.kind == "simulated" or not any(node.get("GPU") for node in there):
        return None
    return float(config.engine.tensor_parallel_size)


def local_cpus(config: RunConfig) -> int:
    """CPUs of a cluster with room for the engines and for reading beside them."""
    return int(actors(config)[1] * config.ray.num_cpus) + 3
