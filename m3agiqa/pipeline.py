"""A run on a Ray cluster: corpus -> decoding tasks -> engine actors -> parquet.

Finished rows are committed a file at a time, in the two phases of Ray Data's checkpointing, so the same command on
the same output goes on where an earlier one stopped. What is done is read from the rows themselves (`resume.py`).
"""

import contextlib
import errno
import re
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import CheckpointManager
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m3agiqa.adapters import load_adapters, trained_on
from m3agiqa.config import RunConfig
from m3agiqa.connection import connect
from m3agiqa.corpus import Corpus, open_corpus
from m3agiqa.corpus.files import absolute
from m3agiqa.decoding import decode_rows
from m3agiqa.driver_memory import Forget
from m3agiqa.errors import RunBroken, UserError
from m3agiqa.flow import Flow
from m3agiqa.lease import Lease
from m3agiqa.models import model_folder
from m3agiqa.opinions import check_predictor, with_states
from m3agiqa.passing import as_written
from m3agiqa.progress import Board, Live, too_many_failed
from m3agiqa.prometheus import MeteredActor
from m3agiqa.records import RESERVED_COLUMNS, Status
from m3agiqa.replace import finish_replacing, replace_rows, retry_output
from m3agiqa.resources import actor_pool, check_resources, decode_args, gpus, local_cpus, nodes, set_limits
from m3agiqa.resume import Todo, done_ids, drop_twice, ids_with, recover
from m3agiqa.runs import Manifest, Output, fingerprint, fingerprint_parts, states_of
from m3agiqa.scoring import check_given
from m3agiqa.seen import FILE as TRAINED_ON
from m3agiqa.seen import Seen
from m3agiqa.source import MOST_TRIES, CorpusSource, cut, may_kill

# Loading a large model, or waiting for a GPU, counts as no progress; Ray's own limit is 30 minutes.
_NO_PROGRESS_S = 6 * 3600.0
# Reading and writing wait for files; a share of a CPU lets them in beside an engine on a small machine.
_IO_CPUS = 0.25
# Up to here the driver compares the ids of a corpus itself.
_FEW_ROWS = 1_000_000
# What a full disk says, and of which file, where it says it; errors come through Ray as text.
_FULL = (f"[Errno {errno.ENOSPC}]", f"[Errno {errno.EDQUOT}]", "No space left on device", "local disk's utilization")
_FULL_AT = re.compile(rf"\[Errno (?:{errno.ENOSPC}|{errno.EDQUOT})\] [^:\n]*: '([^'\n]+)'")


@dataclass(frozen=True)
class _Run:
    """What the parts of a run need to know: its rows go into `target`, which is not `output` where they are retried."""

    config: RunConfig
    corpus: Corpus
    output: Output
    target: Output
    todo: Todo
    lease: Lease
    verbose: bool

    @property
    def total(self) -> int | None:
        """Rows that are to be scored, or None where that is not known."""
        if self.todo.only is not None:
            return len(self.todo.only.without(self.todo.done))
        return None if self.corpus.rows is None else max(self.corpus.rows - len(self.todo.done), 0)


def run_scoring(
    config: RunConfig,
    input_uri: str,
    output_uri: str,
    *,
    retry: Collection[Status] = (),
    command: str | None = None,
    verbose: bool = False,
) -> Manifest:
    """Scores a corpus into `output_uri` and returns the manifest of the run; with `capture.write` a training set.

    Rows that an earlier run of the same fingerprint has written there are kept and not scored again.

    Args:
        retry: instead score those written rows anew that ended so, and put the new rows in their place.
        command: what was typed, for the manifest.

    Raises:
        UserError: for an input, an output or a configuration that cannot be used; before any work is done.
        TooManyFailed: more rows failed than `ray.max_failed_fraction` allows; all scored rows are written.
        RunBroken: the machines failed (a full disk, an engine that does not live).
    """
    # The corpus first: a mistyped path must not cost a download of weights.
    corpus = open_corpus(input_uri, **config.corpus.model_dump(), access=config.access, reserved=RESERVED_COLUMNS)
    check_given(config, corpus.schema)
    config = with_states(config)
    check_predictor(config)
    parts = fingerprint_parts(config)
    manifest = Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), absolute(input_uri))
    if config.capture.write:
        manifest.first_answer, manifest.states_of = config.capture.first_answer, states_of(config)
    met, manifest.silent_adapters = trainings_of(config)
    for note in corpus.notes:
        print(f"note: {note}", file=sys.stderr)
    manifest.started, manifest.rows, manifest.command = _now(), corpus.rows, command
    output = Output(output_uri)
    output.check(manifest)
    output.make()
    try:
        with Lease(output) as lease:
            # Again: whoever had the folder until now may have written there.
            output.check(manifest)
            corpus = replace(corpus, schema=as_written(output, corpus.schema))
            if retry and corpus.rows is None and (earlier := output.read_manifest()) is not None:
                manifest.rows = earlier.rows
            output.write_manifest(manifest)
            if met is None:
                output.remove(TRAINED_ON)  # of an attempt that wrote no row
            else:
                output.write_whole(TRAINED_ON, met.write)
            return _score(config, corpus, output, manifest, lease, retry, verbose)
    except Exception as error:
        if not isinstance(error, UserError) and any(sign in str(error) for sign in _FULL):
            raise _full_disk(output, str(error)) from error
        raise


def _full_disk(output: Output, said: str) -> RunBroken:
    """What a run ends with that came to the end of a disk, which may be the output's or one of a node."""
    found, cure = _FULL_AT.search(said), "make room; the same command goes on"
    if found is not None and not f"{found[1]}/".startswith(f"{output.path}/"):
        return RunBroken(found[1], "there is no space left on its disk", cure)
    if _FULL[-1] in said:
        return RunBroken("the disk of a node, with Ray's temporary files", "there is no space left on it", cure)
    return RunBroken(f"--output {output.uri}", "there is no space left on it", cure)


def trainings_of(config: RunConfig) -> tuple[Seen | None, list[str]]:
    """What the model and the adapters that judge were trained on; and the names of adapters that do not say it."""
    if config.engine.kind == "simulated":
        return None, []
    folder = model_folder(config.model)
    adapters = load_adapters(config.model.adapters, folder)
    return trained_on(folder, [adapters[aspect] for aspect in config.scoring.aspects if aspect in adapters])


def _score(
    config: RunConfig,
    corpus: Corpus,
    output: Output,
    manifest: Manifest,
    lease: Lease,
    retry: Collection[Status],
    verbose: bool,
) -> Manifest:
    started = time.monotonic()
    try:
        _write_rows(config, corpus, output, manifest, lease, retry, verbose)
    except BaseException:
        # What it ends with is said elsewhere; and a disk may be full, or the folder be another run's by now.
        with contextlib.suppress(OSError, pa.ArrowException):
            if lease.is_mine():
                _sum_up(output, manifest, started)
        raise
    manifest.finished = _now()
    _sum_up(output, manifest, started, all_read=corpus.rows is None and not retry)
    failed, rows = manifest.counts.get(Status.FAILED, 0), sum(manifest.counts.values())
    if failed > config.ray.max_failed_fraction * rows:
        raise too_many_failed(failed, rows, config.ray.max_failed_fraction)
    return manifest


def _sum_up(output: Output, manifest: Manifest, started: float, *, all_read: bool = False) -> None:
    """Writes what a run that began at `started` has come to; where `all_read`, its rows are those of the input."""
    manifest.counts = output.count_by_status()
    if all_read:
        manifest.rows = sum(manifest.counts.values())
    manifest.seconds = round(time.monotonic() - started, 3)
    output.write_manifest(manifest)


def _write_rows(
    config: RunConfig,
    corpus: Corpus,
    output: Output,
    manifest: Manifest,
    lease: Lease,
    retry: Collection[Status],
    verbose: bool,
) -> None:
    """Brings the output's rows up to the corpus, or those of some statuses up to date."""
    finish_replacing(output)
    target = retry_output(output) if retry else output
    # Another run may have been killed here, and a worker of it may outlive it by a moment.
    target.make()
    cut_short = recover(target)
    done = done_ids(target)
    todo = Todo(done, ids_with(output, retry) if retry else None)
    run = _Run(config, corpus, output, target, todo, lease, verbose)
    if not _all_done(run):
        _work(run, manifest)
        cut_short = True if retry else cut_short
    if cut_short:
        drop_twice(target, done_ids(target).twice())
    if retry:
        replace_rows(output)


def _all_done(run: _Run) -> bool:
    """Whether it is certain, without reading images, that every row is written: then no engine is started."""
    if run.todo.only is not None:
        return run.total == 0
    if run.corpus.rows is None or not 0 < run.corpus.rows <= len(run.todo.done) <= _FEW_ROWS:
        return False
    for shard in run.corpus.shards:
        for rows in shard.read():
            embeds_images = rows["_bytes"].null_count < rows.num_rows
            if embeds_images or run.todo.select(rows).num_rows:
                return False
    return True


def _work(run: _Run, manifest: Manifest) -> None:
    """Scores what is to do. What the engines counted goes into the manifest."""
    connect(run.config.ray.address, local_cpus(run.config), verbose=run.verbose)
    check_resources(run.config)
    # Beside the driver: with another node it could be lost, and with it what the driver has to know.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place = {"num_cpus": 0, "scheduling_strategy": here}
    # Rows that failed before are no measure of how the run goes.
    may_fail = run.config.ray.max_failed_fraction if run.todo.only is None else 1.0
    board: Any = ray.remote(Board).options(**place).remote(may_fail)
    taken_over = UserError(f"--output {run.output.uri}", "another run has taken it over", "leave it to that one")
    run.lease.on_lost = lambda: board.refuse.remote(taken_over)
    live = Live(lambda: ray.get(board.snapshot.remote()), run.total)
    try:
        with live:
            run.lease.live = live.report
            _execute(run, manifest.fingerprint, board)
        if (refusal := ray.get(board.refusal.remote())) is not None:
            raise refusal
    finally:
        manifest.note_work(live.last, time.time())
        # It would live as long as this process, and the next run in it has its own.
        ray.kill(board)


class _NothingKnown(CheckpointManager):
    """In place of Ray Data's own reading of what is done, which holds all ids in each of its filters."""

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Nothing is filtered: the source does that."""
        return None, 0


def _execute(run: _Run, run_fingerprint: str, board: Any) -> None:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    set_limits(context, run.config)
    context.custom_execution_callback_classes = [Flow, Forget]
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=run.target.checkpoint,
        override_filesystem=run.target.filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=_NothingKnown,
    )
    with DataContext.current(context):
        scored = _dataset(run, run_fingerprint, board)
        try:
            scored.write_parquet(
                run.target.scores,
                filesystem=run.target.filesystem,
                **_file_size(run.config),
                ray_remote_args={"num_cpus": _IO_CPUS},
            )
        except Exception:
            if (refusal := ray.get(board.refusal.remote())) is not None:
                raise refusal from None
            raise


def _dataset(run: _Run, run_fingerprint: str, board: Any) -> ray.data.Dataset:
    config = run.config
    accepted, slice_rows, text_only = config.images, config.ray.batch_size, config.corpus.text_only
    access, most_tries = run.corpus.access, MOST_TRIES

    def decode(rows: pa.Table) -> Iterator[pa.Table]:
        careful = may_kill(rows, board, most_tries)
        return decode_rows(rows, accepted, access, slice_rows, text_only=text_only, careful=careful)

    read = ray.data.read_datasource(CorpusSource(run.corpus, run.todo, board), num_cpus=_IO_CPUS)
    return (
        cut(read, 4 * slice_rows, _IO_CPUS)
        .map_batches(decode, batch_format="pyarrow", batch_size=4 * slice_rows, **decode_args(config))
        .map_batches(
            MeteredActor,
            fn_constructor_args=(config, run_fingerprint, board, run.verbose),
            batch_format="pyarrow",
            batch_size=slice_rows,
            compute=actor_pool(config),
            num_cpus=config.ray.num_cpus,
            num_gpus=gpus(config, nodes()),
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
