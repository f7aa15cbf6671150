"""What an output folder is: its manifest, its fingerprint, and what it holds so far.

OUTPUT/run.json      the manifest: what was run, on what, and how it ended
OUTPUT/trained_on.parquet  what its adapters were trained on, as far as their folders say (seen.py)
OUTPUT/scores/       the rows, as parquet files
OUTPUT/checkpoint/   marks of files that are being written and of those that are whole (Ray Data's)
OUTPUT/lease.json    who is at work in it (lease.py)
OUTPUT/retry/        rows that are scored anew, until they replace those in scores/ (replace.py)
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.fs
from pyarrow import parquet as pq

from m3agiqa import __version__
from m3agiqa.adapters import check_for_vllm, distinct, load_adapters, tower_adapters
from m3agiqa.config import RunConfig
from m3agiqa.conversation import WORDINGS
from m3agiqa.corpus.files import locate
from m3agiqa.engine.simulated import SIMULATED_WIDTH
from m3agiqa.engine.vllm_plugins import check_architectures, check_vllm
from m3agiqa.errors import UserError
from m3agiqa.models import hidden_width, model_config_json, model_digest, model_folder, predictor_folder
from m3agiqa.records import Status

MANIFEST = "run.json"
LEASE = "lease.json"
RETRY = "retry"
_PENDING = ".pending.parquet"


def fingerprint_parts(config: RunConfig) -> dict[str, Any]:
    """Everything that decides a score, by name.

    Raises:
        UserError: for an engine, a model or an adapter that cannot be used, in the engine or at all.
    """
    engine: dict[str, Any] = {"kind": config.engine.kind}
    model: dict[str, Any] = {}
    if config.engine.kind != "simulated":
        engine |= {
            "version": _engine_version(config.engine.kind),
            "args": config.engine.vllm_args,
            "batch_invariant": config.engine.batch_invariant,
        }
        model = config.model.model_dump(mode="json", exclude={"path", "revision", "adapters"})
        folder = model_folder(config.model)
        model["files"] = model_digest(folder)
        adapters = load_adapters(config.model.adapters, folder)
        model["adapters"] = {str(aspect): adapter.digest for aspect, adapter in adapters.items()}
        check_capture(config)
        if config.engine.kind == "vllm":
            for adapter in distinct(adapters):
                check_for_vllm(adapter, folder, tower=tower_adapters(config.engine.vllm_args))
    parts = {
        "model": model,
        "engine": engine,
        "scoring": config.scoring.model_dump(mode="json"),
        "questions": _wording(config),
        "images": "none" if config.corpus.text_only else config.images.model_dump(mode="json"),
    }
    # Only where they are not the usual: what was scored before they existed keeps its fingerprint.
    if config.capture.first_answer != "own":
        parts["descriptions"] = {str(aspect): column for aspect, column in config.capture.descriptions.items()}
    if config.capture.write:
        parts["written"] = config.capture.kind
    if (predictor := predictor_folder(config)) is not None:
        parts["predictor"] = model_digest(predictor)
    return parts


def states_of(config: RunConfig) -> dict[str, str]:
    """What decides the captured states: a predictor's scores mean something only for states of equal values.

    Keys: `base` (digest of the checkpoint), `adapter.ASPECT` (digest, or `none`) for each judged aspect,
    `conversation` (version and digest of the questions), `image` (`shown` or `none`) and `hidden` (width).
    Not among them, as a predictor need not differ for it: precision, engine, image limits, the descriptions'
    length and whose descriptions they are (`Manifest.first_answer`). Loads no model. The simulated engine,
    which has none, has no adapters.
    """
    found = {
        "conversation": f"{config.scoring.conversation} {_wording(config)}",
        "image": "none" if config.corpus.text_only else "shown",
    }
    if config.engine.kind == "simulated":
        return found | {"base": "simulated", "hidden": str(SIMULATED_WIDTH)}
    folder = model_folder(config.model)
    adapters = load_adapters(config.model.adapters, folder)
    digests = {f"adapter.{a}": adapters[a].digest if a in adapters else "none" for a in config.scoring.aspects}
    return found | {"base": model_digest(folder), "hidden": str(hidden_width(folder))} | digests


def _wording(config: RunConfig) -> str:
    return hashlib.sha256(repr(WORDINGS[config.scoring.conversation]).encode()).hexdigest()[:16]


def fingerprint(parts: dict[str, Any]) -> str:
    """16 hex digits that are equal where all parts are."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _engine_version(kind: str) -> str:
    return check_vllm() if kind == "vllm" else f"transformers {version('transformers')}"


def check_capture(config: RunConfig) -> None:
    """Refuses a model whose states are wanted where vLLM cannot capture them, before any work is done.

    Raises:
        UserError: with the models that will do.
    """
    if config.engine.kind == "vllm" and config.capture.kind != "none":
        check_architectures(model_config_json(model_folder(config.model)).get("architectures") or [])


@dataclass
class Manifest:
    """The content of `run.json`.

    Attributes:
        seconds: how long the last command on this output took, the engine's start included.
        images_per_second: of that command, from the first engine's start to the last file's end.
        counts: rows in the output by status, those of earlier commands included.
        rows: of the input; None where that is not known before all of it is read (tars); a retry does not read all.
        command: what was typed, to say how to go on; None where it was no command.
        engine: counters of the engines: tokens, cache queries and hits; how many `engines` there were at once, at most,
            and for how many `engine_seconds` they were up, added up.
        states_of: of a training set, what decided its states; else empty.
        silent_adapters: names of those that do not say what they were trained on; what the others say is in
            `trained_on.parquet` beside it.
        first_answer: of a training set, whether its descriptions are the model's `own` or `given`.
    """

    fingerprint: str
    fingerprint_parts: dict[str, Any]
    config: dict[str, Any]
    input: str
    m3agiqa: str = __version__
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    states_of: dict[str, str] = field(default_factory=dict)
    silent_adapters: list[str] = field(default_factory=list)
    first_answer: str | None = None
    rows: int | None = None
    command: str | None = None

    def note_work(self, seen: Mapping[str, Any], ended: float) -> None:
        """Takes over what the board of a run said last (`Board.snapshot`); `ended` in Unix time."""
        self.engine = {**seen["totals"], "engines": seen["most_engines"], "engine_seconds": seen["engine_seconds"]}
        scored = sum(seen["statuses"].values())
        if scored and seen["ready_at"] is not None:
            self.images_per_second = round(scored / (ended - seen["ready_at"]), 3)


class Output:
    """An output folder, local or on an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.filesystem, self.path = locate(uri)
        except (OSError, ValueError) as error:
            raise UserError(f"--output {uri}", f"cannot be used ({error})", "give a folder or a known URI") from None
        self.scores = f"{self.path}/scores"
        self.checkpoint = f"{self.path}/checkpoint"

    def make(self) -> None:
        """Makes the folder, if it is not there.

        Raises:
            UserError: if it cannot be made.
        """
        try:
            self.filesystem.create_dir(self.scores, recursive=True)
        except OSError as error:
            raise UserError(f"--output {self.uri}", f"cannot be written ({error})", "give a folder you own") from None

    def check(self, manifest: Manifest) -> None:
        """Whether the folder is free, or this run's.

        Raises:
            UserError: if it holds something else, or rows of another fingerprint.
        """
        earlier = self.read_manifest()
        if earlier is None:
            self._refuse_foreign_files()
        elif not self.files():
            pass  # A first attempt that wrote nothing binds nobody.
        elif earlier.fingerprint != manifest.fingerprint:
            changed = ", ".join(differences(earlier.fingerprint_parts, manifest.fingerprint_parts)) or "the version"
            raise UserError(
                f"--output {self.uri}",
                f"holds scores of another fingerprint ({changed} differs)",
                "give another folder, or the configuration that began this one",
            )
        elif _origin(earlier) != _origin(manifest):
            # Its ids may mean other images: they would count as done and keep the other images' scores.
            raise UserError(
                f"--output {self.uri}",
                f"holds scores of another input ({earlier.input}, or other corpus.* settings)",
                "give another folder, or the input that began this one",
            )

    def read_manifest(self) -> Manifest | None:
        """The manifest, or None where there is none.

        Raises:
            UserError: if there is one that cannot be read.
        """
        try:
            data = self.read(MANIFEST)
            return None if data is None else Manifest(**json.loads(data))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{self.uri}/{MANIFEST}", f"is no manifest ({error})", "give another folder or mend it"
            ) from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Writes `run.json`."""
        self.write_whole(MANIFEST, json.dumps(asdict(manifest), indent=2, ensure_ascii=False, default=str).encode())

    def read(self, name: str) -> bytes | None:
        """A small file of the folder, or None where there is none."""
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_whole(self, name: str, content: bytes | Callable[[pa.NativeFile], object]) -> None:
        """Writes a file of the folder, or replaces it: a reader sees the old one or the new one, and never a half.

        Args:
            name: path below the folder.
            content: the bytes, or what writes them into a stream.
        """
        path = f"{self.path}/{name}"
        # Object stores publish an object when it is closed; on a disk the rename does that.
        local = isinstance(self.filesystem, pa.fs.LocalFileSystem)
        with self.filesystem.open_output_stream(f"{path}.new" if local else path) as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
        if local:
            self.filesystem.move(f"{path}.new", path)

    def write_table(self, path: str, rows: pa.Table) -> None:
        """Replaces the score file at `path` (one of `files()`)."""
        self.write_whole(path.removeprefix(f"{self.path}/"), lambda stream: pq.write_table(rows, stream))

    def remove(self, name: str) -> None:
        """Removes a file of the folder, or does nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """The rows that are written, with some or all columns.

        Raises:
            UserError: if there are none.
        """
        return self.dataset().to_table(columns=columns)

    def dataset(self) -> pa.dataset.Dataset:
        """The rows that are written, not read yet.

        Raises:
            UserError: if there are none.
        """
        data = self.written()
        if data is None:
            raise UserError(f"{self.uri}", "holds no scores", "run `m3agiqa score --output` with this folder first")
        return data

    def count_by_status(self) -> dict[str, int]:
        """Number of written rows by status, largest first; empty where nothing is written."""
        data = self.written()
        counts: Counter[str] = Counter()
        for batch in data.to_batches(columns=["status"]) if data is not None else ():
            for entry in pc.value_counts(batch.column("status")).to_pylist():
                counts[entry["values"]] += entry["counts"]
        return dict(counts.most_common())

    def files(self) -> list[str]:
        """Paths of the score files that are committed. Ray Data writes a file in place between two marks of its own.

        What a run that was killed left half-written is removed when the next one starts; until then the
        pending mark tells it apart.
        """
        return self._split_files()[0]

    def half_written(self) -> tuple[list[str], list[str]]:
        """Paths of the score files that a killed run may have left half-written, and those of their marks."""
        return self._split_files()[1:]

    def _split_files(self) -> tuple[list[str], list[str], list[str]]:
        marks = [name for name in self._names(self.checkpoint) if name.endswith(_PENDING)]
        pending = tuple(name.removesuffix(_PENDING) for name in marks)
        names = sorted(name for name in self._names(self.scores) if name.endswith(".parquet"))
        whole = [f"{self.scores}/{name}" for name in names if not name.startswith(pending)]
        half = [f"{self.scores}/{name}" for name in names if name.startswith(pending)]
        return whole, half, [f"{self.checkpoint}/{name}" for name in marks]

    def _names(self, folder: str) -> list[str]:
        found = self.filesystem.get_file_info(pa.fs.FileSelector(folder, allow_not_found=True))
        return [info.base_name for info in found]

    def written(self) -> pa.dataset.Dataset | None:
        """The rows that are written, not read yet; None where there are none."""
        files = self.files()
        return pa.dataset.dataset(files, filesystem=self.filesystem, format="parquet") if files else None

    def _refuse_foreign_files(self) -> None:
        info = self.filesystem.get_file_info(self.path)
        if info.type == pa.fs.FileType.File:
            raise UserError(f"--output {self.uri}", "is a file", "give a folder")
        found = set(self._names(self.path)) - {LEASE, f"{LEASE}.new", f"{MANIFEST}.new"}
        # Without a file in it a run that got no further has left it, or is about to use it.
        if found and (found != {"scores"} or self._names(self.scores)):
            raise UserError(
                f"--output {self.uri}", "is not empty and holds no run of m3agiqa", "give an empty or a new folder"
            )


def _origin(manifest: Manifest) -> tuple[str, dict[str, Any] | None]:
    """What decides which images ids mean: columns that are left out do not."""
    corpus = manifest.config.get("corpus")
    return manifest.input, corpus and {name: value for name, value in corpus.items() if name != "drop"}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that are not equal in two nested mappings."""
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def engine_line(totals: dict[str, float]) -> str | None:
    """`58,112 prompt tokens (61 % from the prefix cache), 4,913 generated`, or None where nothing was counted."""
    if not totals.get("prompt_tokens"):
        return None
    parts = f"{totals['prompt_tokens']:,.0f} prompt tokens"
    notes = []
    if totals.get("prefix_cache_queries"):
        notes.append(f"{totals['prefix_cache_hits'] / totals['prefix_cache_queries']:.0%} from the prefix cache")
    if totals.get("encoded_images") and totals.get("images"):
        notes.append(f"{totals['encoded_images'] / totals['images']:.2f} encodings an image")
    shown = f" ({', '.join(notes)})" if notes else ""
    preempted = f", {totals['preemptions']:,.0f} preemptions" if totals.get("preemptions") else ""
    queue = ""
    if totals.get("steps"):
        running, waiting = (totals[f"{kind}_requests"] / totals["steps"] for kind in ("running", "waiting"))
        queue = f"; per engine {running:.0f} requests at work and {waiting:.0f} queued on average"
    return f"{parts}{shown}, {totals.get('generated_tokens', 0):,.0f} generated{preempted}{queue}"


def predictor_line(manifest: Manifest) -> str | None:
    """`3.2 s of work, 2.1 % of the time that the engine was up`, or None where there was no predictor."""
    seconds, up = (manifest.engine.get(key, 0.0) for key in ("predictor_seconds", "engine_seconds"))
    if not seconds or not up:
        return None
    return f"{seconds:.1f} s of work, {seconds / up:.1%} of the time that the engine was up"


def status_line(counts: dict[str, int]) -> str:
    """`24 rows: 22 ok, 2 rejected, 0 failed`."""
    named = ", ".join(f"{counts.get(status, 0)} {status}" for status in Status)
    return f"{sum(counts.values())} rows: {named}"
