"""A run on a Ray cluster: corpus -> decoding tasks -> engine actors -> parquet.

The only module that speaks Ray. Finished rows are committed a file at a time by Ray Data's checkpointing,
so the same command on the same output goes on where an earlier one stopped.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m3agiqa.config import RunConfig
from m3agiqa.corpus import Corpus, Shard, open_corpus
from m3agiqa.corpus.files import absolute
from m3agiqa.errors import UserError
from m3agiqa.opinions import check_predictor, with_states
from m3agiqa.progress import Board, Live
from m3agiqa.records import RESERVED_COLUMNS
from m3agiqa.runs import Manifest, Output, fingerprint, fingerprint_parts, states_of
from m3agiqa.scoring import Scorer, check_given, decode_rows

# Loading a large model, or waiting for a GPU, counts as no progress; Ray's own limit is 30 minutes.
_NO_PROGRESS_S = 6 * 3600.0
# Times that an actor loses its engine, no row scored in between, after which a new one would not help.
_MOST_LOSSES = 3
# Reading and writing wait for files; a share of a CPU lets them in beside an engine on a small machine.
_IO_CPUS = 0.25
# Up to here the driver compares the ids of a corpus itself.
_FEW_ROWS = 1_000_000


def run_scoring(config: RunConfig, input_uri: str, output_uri: str, *, verbose: bool = False) -> Manifest:
    """Scores a corpus into `output_uri` and returns the manifest of the run; with `capture.write` a training set.

    Rows that an earlier run of the same fingerprint has written there are kept and not scored again.

    Raises:
        UserError: for an input, an output or a configuration that cannot be used; before any work is done.
    """
    # The corpus first: a mistyped path must not cost a download of weights.
    corpus = open_corpus(input_uri, **config.corpus.model_dump(), reserved=RESERVED_COLUMNS)
    check_given(config, corpus.schema)
    config = with_states(config)
    check_predictor(config)
    parts = fingerprint_parts(config)
    manifest = Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), absolute(input_uri))
    if config.capture.write:
        manifest.first_answer, manifest.states_of = config.capture.first_answer, states_of(config)
    for note in corpus.notes:
        print(f"note: {note}", file=sys.stderr)
    output = Output(output_uri)
    manifest.started = _now()
    output.prepare(manifest)
    done_before = sum(output.count_by_status().values())
    started = time.monotonic()
    if _all_done(corpus, output, done_before):
        return _finish(output, manifest, started)
    connect(config.ray.address, _cpus(config), verbose=verbose)
    _check_resources(config)
    # Beside the driver: with another node it could be lost, and with it what the driver has to know.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    total = None if corpus.rows is None else max(corpus.rows - done_before, 0)
    with Live(lambda: ray.get(board.snapshot.remote()), total) as live:
        _execute(config, corpus, output, manifest.fingerprint, board, verbose)
    ended = time.time()
    manifest.engine = live.last["totals"] | {"engines": live.last["engines"]}
    scored = sum(live.last["statuses"].values())
    if scored and live.last["ready_at"] is not None:
        manifest.images_per_second = round(scored / (ended - live.last["ready_at"]), 3)
    return _finish(output, manifest, started)


def _finish(output: Output, manifest: Manifest, started: float) -> Manifest:
    manifest.counts = output.count_by_status()
    manifest.finished = _now()
    manifest.seconds = round(time.monotonic() - started, 3)
    output.write_manifest(manifest)
    return manifest


def _all_done(corpus: Corpus, output: Output, written_rows: int) -> bool:
    """Whether it is certain, without reading images, that every row is written: then no engine is started."""
    if corpus.rows is None or not 0 < corpus.rows <= written_rows <= _FEW_ROWS:
        return False
    written = set(output.rows(["id"])["id"].to_pylist())
    for shard in corpus.shards:
        for rows in shard.read():
            embeds_images = rows["_bytes"].null_count < rows.num_rows
            if embeds_images or not written.issuperset(rows["id"].to_pylist()):
                return False
    return True


class CorpusSource(Datasource):
    """The corpus as a Ray Data source: one read task for each shard."""

    def __init__(self, corpus: Corpus, board: Any) -> None:
        super().__init__()
        self._corpus, self._board = corpus, board

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known without reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a shard, however many are asked for: a shard is what can be read on its own."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        schema = self._corpus.schema
        return [
            ReadTask(_reader(shard, self._board), unknown, schema=schema, per_task_row_limit=per_task_row_limit)
            for shard in self._corpus.shards
        ]


def _reader(shard: Shard, board: Any) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        try:
            yield from shard.read()
        except UserError as error:
            ray.get(board.refuse.remote(error))
            raise

    return read


class _ScorerActor:
    """A scorer in a Ray actor. Several batches may be in its engine at once."""

    def __init__(self, config: RunConfig, fingerprint: str, board: Any, verbose: bool) -> None:
        _quiet_libraries(verbose)
        # Ray Data runs several batches of each of its tasks at once; this is what bounds them all together.
        self._places = asyncio.Semaphore(config.ray.batches_in_flight)
        self._board = board
        self._name = ray.get_runtime_context().get_actor_id()
        try:
            self._scorer = Scorer(config, fingerprint)
        except UserError as error:
            ray.get(board.refuse.remote(error))
            raise

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        self._board.report.remote(self._name, {}, self._scorer.stats())
        try:
            async with self._places:
                scored = await self._scorer.score(rows)
        except UserError as error:
            await self._board.refuse.remote(error)
            raise
        except Exception:
            if await self._board.lost.remote(self._name) >= _MOST_LOSSES:
                raise
            # The engine is gone. Ray starts a process that has ended anew and gives it the batch again;
            # an exception would end the run, or count good rows as errors.
            logging.getLogger(__name__).exception("the engine is lost; this actor ends and is started anew")
            os._exit(1)
        self._board.report.remote(self._name, Counter(scored["status"].to_pylist()), self._scorer.stats())
        yield scored


def _execute(
    config: RunConfig, corpus: Corpus, output: Output, run_fingerprint: str, board: Any, verbose: bool
) -> None:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=output.checkpoint,
        override_filesystem=output.filesystem,
        delete_checkpoint_on_success=False,
    )
    with DataContext.current(context):
        scored = _dataset(config, corpus, run_fingerprint, board, verbose)
        try:
            scored.write_parquet(
                output.scores,
                filesystem=output.filesystem,
                **_file_size(config),
                ray_remote_args={"num_cpus": _IO_CPUS},
            )
        except Exception:
            refusal = ray.get(board.refusal.remote())
            if refusal is not None:
                raise UserError(*refusal) from None
            raise


def _dataset(config: RunConfig, corpus: Corpus, run_fingerprint: str, board: Any, verbose: bool) -> ray.data.Dataset:
    limits, slice_rows, text_only = config.images, config.ray.batch_size, config.corpus.text_only

    def decode(rows: pa.Table) -> Iterator[pa.Table]:
        return decode_rows(rows, limits, slice_rows, text_only=text_only)

    return (
        ray.data.read_datasource(CorpusSource(corpus, board), num_cpus=_IO_CPUS)
        # A manifest of text is read as a block or two: without this one task would decode all of its images.
        .repartition(target_num_rows_per_block=4 * slice_rows)
        .map_batches(decode, batch_format="pyarrow", batch_size=4 * slice_rows, num_cpus=_decode_cpus(config))
        .map_batches(
            _ScorerActor,
            fn_constructor_args=(config, run_fingerprint, board, verbose),
            batch_format="pyarrow",
            batch_size=slice_rows,
            compute=_pool(config),
            num_cpus=config.ray.num_cpus,
            num_gpus=_gpus(config),
        )
    )


def _file_size(config: RunConfig) -> dict[str, Any]:
    """How much goes into a file: so many rows, or so many bytes where rows hold states.

    Ray Data cuts blocks, which become row groups, at 128 to 192 MiB or after one row, and the block that fills
    a file up goes into it whole: a file is bounded, whatever the model's width. At 600 tokens of 4,096 numbers
    (an 8B model) a row has 4.7 MiB for each aspect, and a file 20 to 32 rows of all three or 55 to 95 of one.
    """
    if config.capture.write:
        return {"min_bytes_per_file": config.capture.mib_per_file * 2**20}
    return {"min_rows_per_file": config.ray.rows_per_file}


def _pool(config: RunConfig) -> ray.data.ActorPoolStrategy:
    low, high = config.ray.actors if isinstance(config.ray.actors, tuple) else (config.ray.actors, config.ray.actors)
    at_once = 1 if config.engine.kind == "transformers" else config.ray.batches_in_flight
    return ray.data.ActorPoolStrategy(
        min_size=low,
        max_size=high,
        max_tasks_in_flight_per_actor=at_once + 1,
        max_concurrent_calls_per_actor=at_once,
    )


def _decode_cpus(config: RunConfig) -> float:
    # Ray Data fuses neighbours that ask for the same; decoding would then wait for the engine in its actor.
    same = config.ray.decode_cpus == config.ray.num_cpus
    return config.ray.decode_cpus + (0.001 if same else 0.0)


def _check_resources(config: RunConfig) -> None:
    """Refuses what no node of the cluster has: it would be waited for in silence.

    Raises:
        UserError: naming what is asked for and what there is. A growing cluster may get it; then only the
            largest node it has now counts, which is why a GPU is not asked for where there is none yet.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": ("ray.num_cpus", config.ray.num_cpus), "GPU": ("ray.num_gpus", _gpus(config) or 0.0)}
    for resource, (key, wanted) in needs.items():
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if wanted > most:
            raise UserError(
                f"{key}={wanted:g}", f"no node of the cluster has more than {most:g} {resource}s", "ask for fewer"
            )


def _gpus(config: RunConfig) -> float | None:
    if config.ray.num_gpus is not None:
        return config.ray.num_gpus
    if config.engine.kind == "simulated" or not ray.cluster_resources().get("GPU"):
        return None
    return float(config.engine.tensor_parallel_size)


def _cpus(config: RunConfig) -> int:
    """CPUs of a cluster with room for the engines and for reading beside them."""
    most = config.ray.actors[1] if isinstance(config.ray.actors, tuple) else config.ray.actors
    return int(most * config.ray.num_cpus) + 3


def connect(address: str | None, cpus: int, *, verbose: bool = False) -> None:
    """Joins the cluster, or starts a local one that counts at least so many CPUs.

    Args:
        address: of the cluster, or `auto`; None: that of the Ray job this is, else a local one.

    Raises:
        UserError: if no cluster answers there.
    """
    _quiet_libraries(verbose)
    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # "local", or a cluster that happens to run on this machine would be joined, and refuse num_cpus.
        address = "local"
        options |= {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    try:
        with contextlib.nullcontext() if verbose else _muted_stderr():
            ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"ray.address={address}", f"no cluster answers ({error})", "check `ray status`, or leave it out"
        ) from None


def _quiet_libraries(verbose: bool) -> None:
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
