"""Where the numbers of a training go while it runs: TensorBoard always, MLflow and W&B if they are asked for."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from m3agiqa.errors import UserError


class Tracker(Protocol):
    """Takes numbers by name, epoch by epoch."""

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Notes the numbers of one epoch."""

    def close(self) -> None:
        """Writes what is still held back."""


class TensorBoard:
    """Event files in a folder (`tensorboard --logdir FOLDER`); several runs of one training go there."""

    def __init__(self, folder: Path) -> None:
        self._writer = _package("tensorboardX", "m3agiqa[train]").SummaryWriter(str(folder))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Notes the numbers of one epoch."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()


class MLflow:
    """A run of an MLflow experiment; where it is kept says MLFLOW_TRACKING_URI."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow = _package("mlflow", "mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(dict(_flat(config)))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Notes the numbers of one epoch."""
        self._mlflow.log_metrics(dict(numbers), step=epoch)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


class WandB:
    """A run of a Weights & Biases project."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._run = _package("wandb", "wandb").init(project=project, name=name, config=dict(config))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Notes the numbers of one epoch."""
        self._run.log(dict(numbers), step=epoch)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def check_trackers(wanted: Sequence[str]) -> None:
    """Makes sure that the packages are there, without importing them.

    Raises:
        UserError: naming the package that is not.
    """
    for module, install in (("tensorboardX", "m3agiqa[train]"), *((name, name) for name in wanted)):
        if importlib.util.find_spec(module) is None:
            _refuse(module, install)


def open_trackers(
    folder: Path, wanted: Sequence[str], project: str, name: str, config: Mapping[str, Any]
) -> list[Tracker]:
    """TensorBoard, and those that are wanted (`mlflow`, `wandb`).

    Raises:
        UserError: if a package is not installed.
    """
    trackers: list[Tracker] = [TensorBoard(folder)]
    if "mlflow" in wanted:
        trackers.append(MLflow(project, name, config))
    if "wandb" in wanted:
        trackers.append(WandB(project, name, config))
    return trackers


def _package(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        _refuse(module, install)


def _refuse(module: str, install: str) -> None:
    what = f"track.to={module}" if module == install else "training"
    raise UserError(what, f"needs the package {module}, which is not installed", f"pip install '{install}'") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
