"""`m3agiqa plan`: what is wrong with a run, and what it would take, before a GPU is taken.

Everything is looked at without an engine; only where images are to be measured, and nothing is wrong, one is started,
in this process.
"""

import asyncio
import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from m3agiqa.config import RunConfig
from m3agiqa.connection import connect, counted_cpus, quiet_libraries
from m3agiqa.corpus import Corpus, open_corpus
from m3agiqa.corpus.files import absolute
from m3agiqa.decoding import decode_rows
from m3agiqa.engine.base import create_engine
from m3agiqa.errors import UserError
from m3agiqa.models import model_folder, predictor_folder
from m3agiqa.opinions import check_predictor, with_states
from m3agiqa.passing import as_written
from m3agiqa.progress import duration
from m3agiqa.prometheus import gpu_memory
from m3agiqa.records import RESERVED_COLUMNS, Status
from m3agiqa.resources import actors, check_gpus, gpus, local_cpus, missing, nodes
from m3agiqa.runs import Manifest, Output, fingerprint, fingerprint_parts
from m3agiqa.scoring import Scorer, check_given

# Rows of the corpus that are looked at, over so many shards.
_SAMPLE, _SHARDS = 64, 8
_PROBE = "plan.probe"
_MILLION = 1_000_000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `error` says what is wrong with it, `found` what is known of it."""

    name: str
    found: str
    error: UserError | None = None


@dataclass(frozen=True)
class Measured:
    """What scoring some images in the real engine gave.

    Attributes:
        images: how many. per_second: of one engine, once it was up.
        start_s: until the engine was up. bytes_per_row: of the output.
        memory_mib: peak of this process and of the largest it started. gpu_mib: taken of all GPUs here; None: no GPU.
    """

    images: int
    per_second: float
    start_s: float
    bytes_per_row: float
    memory_mib: float
    gpu_mib: float | None
    statuses: dict[str, int]


@dataclass
class Plan:
    """What was found.

    Attributes:
        rows: of the corpus; None where counting them would mean reading all of it.
        decode_ms: CPU time of reading and decoding an image; None where none could be.
    """

    checks: list[Check] = field(default_factory=list)
    rows: int | None = None
    decode_ms: float | None = None
    measured: Measured | None = None

    @property
    def failed(self) -> list[Check]:
        """What keeps the run from starting, or all of its rows from being scored."""
        return [check for check in self.checks if check.error is not None]


def plan(config: RunConfig, input_uri: str, output_uri: str, images: int = 0, *, verbose: bool = False) -> Plan:
    """Looks at everything that a run needs, and, if `images` is not 0 and nothing is wrong, scores so many.

    Nothing is written but an empty probe file in the output's folder, which is removed again.
    """
    quiet_libraries(verbose)
    made = Plan()
    corpus: list[Corpus] = []

    def look(name: str, how: Callable[[], str]) -> None:
        try:
            made.checks.append(Check(name, how()))
        except UserError as error:
            made.checks.append(Check(name, "", error))

    look("corpus", lambda: _corpus(config, input_uri, corpus, made))
    look("model", lambda: _model(config))
    look("predictor", lambda: _predictor(config))
    look("output", lambda: _output(config, input_uri, output_uri, corpus))
    look("cluster", lambda: _cluster(config, verbose))
    if images and not made.failed:
        look("engine", lambda: _engine(config, corpus[0], images, made))
    return made


def report(made: Plan, config: RunConfig) -> Iterator[str]:
    """The plan as lines of text."""
    width = max(len(check.name) for check in made.checks)
    for check in made.checks:
        state = "failed" if check.error else "ok"
        yield f"{state:6}  {check.name:{width}}  {check.error or check.found}"
    if made.measured is not None:
        yield from _estimate(made, made.measured, config)


def _corpus(config: RunConfig, uri: str, opened: list[Corpus], made: Plan) -> str:
    options = config.corpus.model_dump()
    corpus = open_corpus(uri, **options, access=config.access, reserved=RESERVED_COLUMNS)
    check_given(config, corpus.schema)
    opened.append(corpus)
    made.rows = corpus.rows
    counted = f"{corpus.rows:,} rows" if corpus.rows is not None else f"{len(corpus.shards):,} tars, rows not counted"
    if config.corpus.text_only:
        return f"{counted}; their images are not read"
    rows = sample(corpus, _SAMPLE)
    started = time.thread_time()
    decoded = pa.concat_tables(decode_rows(rows, config.images, corpus.access))
    statuses, errors = decoded["_status"].to_pylist(), decoded["_error"].to_pylist()
    good = statuses.count(None)
    first = next((error for error in errors if error), None)
    if not good:
        rule = f"none of the {len(rows)} images that were looked at can be used, the first one since: {first}"
        raise UserError(f"--input {uri}", rule, "mend the paths, or see `m3agiqa config --docs` (access, images)")
    made.decode_ms = (time.thread_time() - started) / len(rows) * 1000
    sides = zip(decoded["_width"].to_pylist(), decoded["_height"].to_pylist(), strict=True)
    pixels = sum(width * height for width, height in sides if width) / good / 1e6
    looked = f"of {len(rows)} looked at {good} can be used, {pixels:.2f} megapixels on average"
    bad = Counter(status for status in statuses if status)
    shown = "".join(f"; {count} {status}, the first one since: {first}" for status, count in bad.most_common(1))
    prompts = rows["prompt"].null_count
    return f"{counted}; {looked}{shown}{f'; {prompts} have no prompt' if prompts else ''}"


def sample(corpus: Corpus, most: int) -> pa.Table:
    """Some rows of a corpus, from several of its shards, of each from the beginning."""
    step = max(1, len(corpus.shards) // _SHARDS)
    shards = corpus.shards[::step][:_SHARDS]
    each = -(-most // len(shards))
    tables = [table.slice(0, each) for shard in shards for table in islice(shard.read(), 1)]
    return pa.concat_tables(tables).slice(0, most)


def _model(config: RunConfig) -> str:
    parts = fingerprint_parts(config.model_copy(update={"predictor": _no_predictor(config)}))
    if config.engine.kind == "simulated":
        return "none: the simulated engine makes its answers up"
    adapters = len(set(parts["model"]["adapters"].values()))
    size = sum(file.stat().st_size for file in model_folder(config.model).glob("*.safetensors")) / 2**30
    return f"{config.model.path}, {size:.2f} GiB of weights, {adapters} adapters, {parts['engine']['version']}"


def _no_predictor(config: RunConfig) -> object:
    return config.predictor.model_copy(update={"path": None})


def _predictor(config: RunConfig) -> str:
    config = with_states(config)
    on_cpu = config.predictor.model_copy(update={"device": "cpu"})
    check_predictor(config.model_copy(update={"predictor": on_cpu}))
    return str(predictor_folder(config) or "none: there will be ratings, but no mean opinion scores")


def _output(config: RunConfig, input_uri: str, uri: str, corpus: list[Corpus]) -> str:
    output = Output(uri)
    try:
        parts = fingerprint_parts(with_states(config))
    except UserError:
        parts = {}  # said of the model or the predictor already
    manifest = Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), absolute(input_uri))
    if parts:
        output.check(manifest)
        for opened in corpus:
            as_written(output, opened.schema)
    done = sum(output.count_by_status().values())
    _probe(output)
    return f"can be written; {done:,} rows are there already" if done else "can be written"


def _probe(output: Output) -> None:
    """Writes an empty file and removes it, and the folders too that were not there before."""
    store, path = output.filesystem, f"{output.path}/{_PROBE}"
    try:
        made = list(_not_there(store, output.path))
        store.create_dir(output.path, recursive=True)
        store.open_output_stream(path).close()
        store.delete_file(path)
        for folder in made:
            # Somebody else may have begun to use it.
            if not store.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
                with contextlib.suppress(FileNotFoundError):
                    store.delete_dir(folder)
    except OSError as error:
        rule = f"cannot be written ({' '.join(str(error).split())[:200]})"
        raise UserError(f"--output {output.uri}", rule, "give a folder that you may write to") from None


def _not_there(store: pafs.FileSystem, path: str) -> Iterator[str]:
    """A folder and those above it, as far as they are not there."""
    while path and store.get_file_info(path).type == pafs.FileType.NotFound:
        yield path
        path = path.rpartition("/")[0]


def _cluster(config: RunConfig, verbose: bool) -> str:
    check_gpus(config)
    low, high = actors(config)
    pool = f"{low} engines" if low == high else f"{low} to {high} engines"
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # What Ray would count here; it is not started for that.
        here = len(gpu_memory())
        there: list[Mapping[str, float]] = [{"CPU": counted_cpus(local_cpus(config)), "GPU": here}]
        found = f"this machine, {os.cpu_count()} CPUs and {here} GPUs, for {pool}"
    else:
        connect(address, local_cpus(config), verbose=verbose)
        there = nodes()
        each = f"{config.ray.num_cpus:g} CPUs and {gpus(config, there) or 0:g} GPUs each"
        found = f"{address} has what {pool} need, {each}"
    if (lacking := missing(config, there)) is not None:
        raise lacking
    return found


def _engine(config: RunConfig, corpus: Corpus, images: int, made: Plan) -> str:
    made.measured = measure(config, corpus, images)
    return f"up in {duration(made.measured.start_s)}, {made.measured.images} images scored"


def measure(config: RunConfig, corpus: Corpus, images: int) -> Measured:
    """Scores some images of a corpus in an engine of this process, as an actor does.

    Raises:
        UserError: if the engine does not start with this configuration, or none of the images is scored.
    """
    config = with_states(config)
    taken = sum(gpu_memory())
    started = time.monotonic()
    scorer = Scorer(config, "plan", create_engine)
    start_s = time.monotonic() - started
    try:
        rows, text_only = sample(corpus, images), config.corpus.text_only
        parts = list(decode_rows(rows, config.images, corpus.access, config.ray.batch_size, text_only=text_only))
        scored, seconds = asyncio.run(_score(scorer, parts, config.ray.batches_in_flight))
        gpu = sum(gpu_memory()) - taken if gpu_memory() else None
    finally:
        scorer.engine.close()
    statuses = dict(Counter(scored["status"].to_pylist()))
    if not statuses.get(Status.OK):
        first = next(error for error in scored["error"].to_pylist() if error)
        raise UserError("engine", f"none of {len(rows)} images was scored, the first one since: {first}", "mend that")
    sink = pa.BufferOutputStream()
    pq.write_table(scored, sink)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    size = sink.getvalue().size / scored.num_rows
    return Measured(len(rows), len(rows) / seconds, start_s, size, sum(peaks) / 1024, gpu, statuses)


async def _score(scorer: Scorer, parts: list[pa.Table], at_once: int) -> tuple[pa.Table, float]:
    """Scored rows, and the seconds that they took: one image first, which is not counted, as it warms the engine up."""
    await scorer.score(parts[0].slice(0, 1))
    places = asyncio.Semaphore(at_once)

    async def one(rows: pa.Table) -> pa.Table:
        async with places:
            return await scorer.score(rows)

    started = time.monotonic()
    scored = await asyncio.gather(*map(one, parts))
    return pa.concat_tables(scored), time.monotonic() - started


def _estimate(made: Plan, measured: Measured, config: RunConfig) -> Iterator[str]:
    rate, (low, high) = measured.per_second, actors(config)
    each = config.ray.num_gpus
    if each is None:
        each = float(config.engine.tensor_parallel_size) if measured.gpu_mib is not None else 0.0
    rows, of = (made.rows, "the corpus") if made.rows is not None else (_MILLION, f"{_MILLION:,} images")
    yield f"measured on {measured.images} images here: {rate:.2f} images/s for each engine (few images: a low estimate)"
    for count in sorted({low, high}):
        hours = rows / rate / count / 3600
        gpu = f", {hours * count * each:,.2f} GPU-hours" if each else ""
        yield f"{of} with {count} engines: {hours:,.2f} hours ({duration(hours * 3600)}){gpu}"
    taken = "" if measured.gpu_mib is None else f", {measured.gpu_mib:,.0f} MiB of GPU memory"
    yield f"memory of an engine: {measured.memory_mib:,.0f} MiB at most{taken}"
    size = measured.bytes_per_row
    yield f"output: {size:,.0f} bytes a row, {size * rows / 2**20:,.1f} MiB for {of}"
    if made.decode_ms is not None:
        yield f"decoding: {made.decode_ms:.1f} ms of a CPU an image, {made.decode_ms * rate / 1000:.2f} CPUs an engine"
    others = {status: count for status, count in measured.statuses.items() if status != Status.OK}
    if others:
        yield f"not scored of them: {', '.join(f'{count} {status}' for status, count in others.items())}"
