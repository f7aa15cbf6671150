"""Trains a predictor on captured sets with Ray Train: captured states -> batches -> the best epoch's folder.

Every process reads its own share, an epoch at a time, through Ray Data: row groups in an order that the seed,
the epoch and the process decide, then shuffled within a window. So nothing but those decides the batches, and
a training that was killed goes on from its last epoch to the same weights.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from ray import train as ray_train
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train.torch import get_device
from safetensors.torch import load_file

from m3agiqa.connection import connect
from m3agiqa.errors import UserError
from m3agiqa.predictor.batches import Batch, Example, batches, generator
from m3agiqa.predictor.calibrate import Calibration, calibrate
from m3agiqa.predictor.captured import (
    Chunk,
    Conversations,
    common_states_of,
    first_answers,
    open_captured,
    read_chunk,
    read_conversations,
)
from m3agiqa.predictor.group import Alone, Processes
from m3agiqa.predictor.shares import Part, data_digest, labels_of, part, trained_on
from m3agiqa.predictor.splits import Parts, split
from m3agiqa.predictor.states import BYTES_OF_A_NUMBER, decode, states_width
from m3agiqa.predictor.store import SHEET, Predictor, build_head
from m3agiqa.predictor.trainer import BEST, EpochRecord, Trainer, head_config, standardisation
from m3agiqa.ray_training import check_batch, check_resources, fit, open_board
from m3agiqa.seen import Seen
from m3agiqa.tracking import check_trackers
from m3agiqa.train_config import TrainConfig
from m3agiqa.training_run import Teller, TrainingRun, of_epochs, out_folder

# Reading waits for files; a share of a CPU lets it in beside the training on a small machine.
_IO_CPUS = 0.5
# Read tasks at once for a worker: one is read while the one before is handed over.
_READERS = 2


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know; it crosses to other machines."""

    config: TrainConfig
    width: int
    outputs: tuple[str, ...]
    scale: tuple[float, float]
    train: Part
    validation: Part
    calibration: Part
    board: Any
    begun: Any
    """The checkpoint of an earlier command, to go on from, or None."""


@dataclass(frozen=True)
class _Origin:
    """What the predictor says of the states that it was trained on (`Predictor.states_of`, `trained_on`).

    Attributes:
        first_answer: whose descriptions they are of.
    """

    states_of: dict[str, str]
    first_answer: str
    met: Seen | None


def train_predictor(
    config: TrainConfig,
    inputs: Sequence[str],
    out: str,
    labels: Mapping[str, str],
    *,
    validation: Sequence[str] = (),
    scale: tuple[float, float] = (0.0, 5.0),
    verbose: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, calibrates and writes a predictor; the same call goes on where an earlier one was stopped.

    Args:
        inputs: captured folders. validation: others that choose the best epoch, instead of a share.
        out: folder for the predictor. labels: aspect -> the column of its label; one output each.
        scale: lowest and highest label. say: takes a line for each epoch, and notes.

    Returns:
        What training.json holds.

    Raises:
        UserError: for inputs, labels, an output or a configuration that cannot be used; before any work is done.
    """
    started = time.monotonic()
    _check_config(config, scale)
    sets = [*(open_captured(uri) for uri in inputs), *(open_captured(uri, "--validation") for uri in validation)]
    conversations = read_conversations(sets, labels, scale)
    names = tuple(labels)
    parts = split(conversations, config, names, len(inputs))
    standardisation(labels_of(conversations, parts.train), names)
    width = states_width(conversations, names)
    run = _run(config, conversations, parts, labels, scale, out_folder(out))
    if (done := run.prepare()) is not None:
        return done
    for note in run.notes:
        say(f"note: {note}")
    connect(config.ray.address, int(config.ray.workers * config.ray.cpus) + 2, verbose=verbose)
    use_gpu = check_resources(config.ray, _IO_CPUS)
    board = open_board()
    learnt, judged, held = (
        part(conversations, names, keys, config.ray.workers)
        for keys in (parts.train, parts.validation, parts.calibration)
    )
    begun = run.begun(config.ray.storage)
    checkpoint = None if begun is None else ray_train.Checkpoint(begun[1], begun[0])
    job = _Job(config, width, names, scale, learnt, judged, held, board, checkpoint)
    wording, values = of_epochs(config.optim.epochs), config.model_dump(mode="json")
    with Teller(run, wording, config.track, values, lambda: ray.get(board.history.remote()), say):
        result = fit(_work, job, run, config.ray, use_gpu=use_gpu, verbose=verbose)
    history = ray.get(board.history.remote())
    origin = _Origin(
        common_states_of(sets, names), first_answers(sets[: len(inputs)]), trained_on(conversations, parts)
    )
    done = _finish(job, run, result, history, origin, started)
    run.forget_checkpoints(config.ray.storage)
    return done


def _check_config(config: TrainConfig, scale: tuple[float, float]) -> None:
    if not scale[0] < scale[1]:
        raise UserError(
            f"--scale {scale[0]:g} {scale[1]:g}", "does not go up", "give the lowest label, then the highest"
        )
    check_batch(config.optim.batch_size, config.ray)
    check_trackers(config.track.to)


def _run(
    config: TrainConfig,
    conversations: Conversations,
    parts: Parts,
    labels: Mapping[str, str],
    scale: tuple[float, float],
    out: Path,
) -> TrainingRun:
    # Not how many workers: they take the same steps, so that fewer or more may go on.
    decides = {
        "config": config.model_dump(mode="json", exclude={"ray": True, "track": True}),
        "inputs": [one.fingerprint for one in conversations.sets],
        "labels": dict(labels),
        "scale": list(scale),
        "data": data_digest(conversations, parts),
    }
    counts = parts.counts(conversations, tuple(labels))
    notes = [*conversations.notes, *parts.notes]
    return TrainingRun(out, decides, counts, [one.uri for one in conversations.sets], notes, SHEET)


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """A worker: goes on from the last checkpoint, trains, and scores the calibration part with the best weights.

    Returns:
        `calibration`: scores [n]; `refusal`: the arguments of a `UserError`, the same in all workers, or None.
    """
    job: _Job = settings["job"]
    context = ray_train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    group = Processes() if size > 1 else Alone()
    device = get_device()
    labels = (job.train.labels, job.validation.labels)
    trainer = Trainer(job.config, job.width, job.outputs, job.scale, *labels, device=device, group=group)
    if (checkpoint := ray_train.get_checkpoint() or job.begun) is not None:
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
    if rank == 0:
        ray.get(job.board.begin.remote(trainer.progress.history))

    def report() -> None:
        record = trainer.progress.history[-1]
        if rank:
            return ray_train.report({"epoch": record["epoch"]})
        with tempfile.TemporaryDirectory() as folder:
            trainer.save(Path(folder))
            ray_train.report({"epoch": record["epoch"]}, checkpoint=ray_train.Checkpoint.from_directory(folder))
        return ray.get(job.board.add.remote(record))

    try:
        trainer.run(_Stream(job, rank), report)
    except UserError as error:
        return {"calibration": [], "refusal": (error.value, error.rule, error.cure)}
    trainer.use_best()
    held = job.calibration
    share = _Share(held, rank, job).batches(job.config.optim.batch_size // size)
    scores = trainer.predict(share, len(held.labels.values), held.labels.outputs)
    return {"calibration": scores.tolist(), "refusal": None}


class _Stream:
    """A worker's batches (`trainer.Source`)."""

    def __init__(self, job: _Job, rank: int) -> None:
        self._config, self._rank = job.config, rank
        self._size = job.config.optim.batch_size // job.config.ray.workers
        self.steps = job.train.steps(self._size)
        self._train = _Share(job.train, rank, job)
        self._validation = _Share(job.validation, rank, job)

    def train(self, epoch: int) -> Iterator[Batch]:
        data, order = self._config.data, generator(self._config.optim.seed, epoch, self._rank)
        examples = self._train.examples(order)
        return batches(examples, self._size, window=data.shuffle_window, bucket=data.bucket_batches, generator=order)

    def validation(self) -> Iterator[Batch]:
        return self._validation.batches(self._size)


class _Share:
    """A worker's share of a part: read anew each time, or kept where it is small."""

    def __init__(self, part: Part, rank: int, job: _Job) -> None:
        self._chunks, self._bucket = part.shares[rank], job.config.data.bucket_batches
        size = part.tokens(rank) * job.width * BYTES_OF_A_NUMBER
        self._keeps = size <= job.config.data.cache_mib * 2**20
        self._kept: dict[int, torch.Tensor] = {}

    def examples(self, order: torch.Generator | None = None) -> Iterator[Example]:
        """All conversations, chunk by chunk, in the order that a generator decides or as they lie."""
        places = range(len(self._chunks)) if order is None else torch.randperm(len(self._chunks), generator=order)
        ordered = [self._chunks[int(i)] for i in places]
        if self._kept:
            yield from ((key, self._kept[key]) for chunk in ordered for key in chunk.keys)
            return
        found: dict[int, torch.Tensor] = {}
        for key, states in _read(ordered):
            if self._keeps:
                found[key] = states
            yield key, states
        self._kept = found

    def batches(self, size: int) -> Iterator[Batch]:
        """All conversations as they lie, in batches of similar lengths."""
        return batches(self.examples(), size, window=size * self._bucket)


def _read(share: Sequence[Chunk]) -> Iterator[Example]:
    """Streams conversations through Ray Data, in the order of the chunks."""
    if not share:
        return
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    with DataContext.current(context):
        data = ray.data.read_datasource(_ChunkSource(share), num_cpus=_IO_CPUS, concurrency=_READERS)
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        keys, tokens = table["key"].to_pylist(), table["tokens"].to_pylist()
        for key, count, states in zip(keys, tokens, table["states"], strict=True):
            yield key, decode(states.as_buffer(), count)


class _ChunkSource(Datasource):
    """Chunks as a Ray Data source: one read task for each."""

    def __init__(self, share: Sequence[Chunk]) -> None:
        super().__init__()
        self._share = share

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known without reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a chunk, however many are asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        # By reference to a module that loads no torch: a process that reads should start at once.
        reads = (partial(read_chunk, chunk) for chunk in self._share)
        return [ReadTask(read, unknown, per_task_row_limit=per_task_row_limit) for read in reads]


def _finish(
    job: _Job,
    run: TrainingRun,
    result: Any,
    history: list[EpochRecord],
    origin: _Origin,
    started: float,
) -> dict[str, Any]:
    """Calibrates the best weights and writes the predictor."""
    config = head_config(job.config, job.width, job.outputs)
    best = max((record for record in history if record["best"]), key=lambda record: record["epoch"])
    scores = torch.tensor(result.return_value["calibration"])
    provenance = {"training": run.fingerprint, "epoch": best["epoch"], "validation": best["validation"]}
    provenance |= {"first_answer": origin.first_answer, "notes": list(run.notes)}
    with result.checkpoint.as_directory() as folder:
        predictor = Predictor(
            build_head(config, load_file(Path(folder) / BEST), f"{folder}/{BEST}"),
            job.scale,
            standardisation(job.train.labels, job.outputs),
            _calibrations(job, scores),
            origin.states_of,
            provenance | run.parts,
            origin.met,
        )
        intervals = {name: one.model_dump() for name, one in predictor.calibration.items()}
        seconds = round(time.monotonic() - started, 3)
        more = {"best_epoch": best["epoch"], "calibration": intervals, "seconds": seconds, "finished": True}
        run.keep_last(Path(folder))
        content = run.write(history, **more)
        predictor.save(run.out)
        return content


def _calibrations(job: _Job, scores: torch.Tensor) -> dict[str, Calibration]:
    labels, found = job.calibration.labels, {}
    for i, name in enumerate(job.outputs):
        own = labels.outputs == i
        if bool(own.any()):
            (found[name],) = calibrate(scores[own], labels.values[own], job.config.calibration.level)
    return found
