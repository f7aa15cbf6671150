"""What every training does with Ray Train: its workers, a board that they write to, and how they come back."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m3agiqa.errors import UserError
from m3agiqa.train_config import WorkersConfig
from m3agiqa.training_run import TrainingRun


def check_batch(batch_size: int, settings: WorkersConfig) -> None:
    """Refuses a batch that the workers cannot share equally."""
    if batch_size % settings.workers:
        raise UserError(
            f"optim.batch_size={batch_size}",
            f"is no multiple of the {settings.workers} workers that share it",
            "change it, or ray.workers",
        )


def check_resources(settings: WorkersConfig, cpus_beside: float = 0.0) -> bool:
    """Refuses what the cluster does not have.

    Args:
        cpus_beside: what the workers' reading needs beside them.

    Returns:
        Whether the workers get a GPU each.
    """
    has, workers = ray.cluster_resources(), settings.workers
    cpus = workers * settings.cpus + cpus_beside
    if cpus > has.get("CPU", 0):
        raise UserError(
            f"ray.workers={workers}",
            f"they and the reading need {cpus:g} CPUs, and the cluster has {has.get('CPU', 0):g}",
            "ask for fewer, or for fewer ray.cpus each",
        )
    gpus = has.get("GPU", 0)
    if settings.use_gpu and gpus < workers:
        raise UserError("ray.use_gpu=true", f"{workers} workers, but {gpus:g} GPUs", "ask for fewer workers")
    return bool(gpus >= workers) if settings.use_gpu is None else settings.use_gpu


class _Board:
    """The records so far; lives in a Ray actor of its own beside the driver."""

    def __init__(self) -> None:
        self._history: list[Any] = []
        self._notes: list[str] = []

    def begin(self, history: list[Any]) -> None:
        """Workers have started, from these records on."""
        self._history = list(history)

    def add(self, record: Any) -> None:
        """A new record; what it is of is safe by now."""
        self._history.append(record)

    def history(self) -> list[Any]:
        """All records, those of earlier commands included."""
        return self._history

    def note(self, notes: list[str]) -> None:
        """What the workers have to say beside the records, once however often they start."""
        self._notes += [note for note in notes if note not in self._notes]

    def notes(self) -> list[str]:
        """All of that."""
        return self._notes


def open_board() -> Any:
    """A handle of a new board on the driver's node: with another it could be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()


_TorchTrainer: Any = TorchTrainer


class _Trainer(_TorchTrainer):
    """Ray's trainer without its placement group cleaner.

    The cleaner looks for the training's controller through the dashboard of whichever cluster it finds first.
    Where there are several on a machine, or no dashboard, it ends a training that is well, or holds up its end.
    What it would clean up goes with the driver's job anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [one for one in found if not isinstance(one, PlacementGroupCleanerCallback)]


def fit(
    work: Callable[[dict[str, Any]], dict[str, Any]],
    job: Any,
    run: TrainingRun,
    settings: WorkersConfig,
    *,
    use_gpu: bool,
    verbose: bool,
) -> Any:
    """Runs the workers.

    Args:
        work: is given `{"job": job}`; what it returns has a `refusal`, the arguments of a `UserError` or None.

    Returns:
        Ray's result, whose `return_value` is that of `work`.
    """
    # A worker that reports waits until it is looked at: at Ray's 2 s most of a small training would be waiting.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    resources = {"CPU": settings.cpus, **({"GPU": 1} if use_gpu else {})}
    if not verbose:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    its_work: Any = work  # Ray's types want a plain dict
    trainer = _Trainer(
        its_work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # A name of its own: what an earlier run of Ray's has left is looked through by `begun`.
            name=f"{time.time_ns()}",
            storage_path=run.storage(settings.storage),
            # The one before the last, too: the last may have been lost while it was written.
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        result: Any = trainer.fit()
    except (ray.exceptions.RayActorError, SystemExit) as error:
        # Ray Train answers Ctrl-C by ending its controller, and then this process without a word.
        if isinstance(error, SystemExit) or "exit_actor" in str(error):
            raise KeyboardInterrupt from None
        raise
    if refusal := result.return_value["refusal"]:
        raise UserError(*refusal)
    return result
