"""One training, of a predictor or an adapter, as it lies on disk, and what is said of it. Knows nothing of Ray.

OUT/                          what comes out, once it is done
OUT.training/training.json    what is trained and on what, and the numbers of each epoch or step, as they come
OUT.training/tensorboard/     the same numbers for TensorBoard
OUT.training/last/            what the training ended with: OUT is what it was at its best
OUT.training/ray/             checkpoints to go on from; gone once it is done

Beside OUT and not in it, so that what comes out is what it is, wherever and however often it was trained.
"""

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pyarrow import fs as pafs

from m3agiqa import __version__
from m3agiqa.corpus.files import join, local_out, locate
from m3agiqa.errors import UserError
from m3agiqa.predictor.trainer import EpochRecord
from m3agiqa.progress import duration
from m3agiqa.runs import differences
from m3agiqa.tracking import open_trackers
from m3agiqa.train_config import TrackConfig

SHEET_OF_TRAINING = "training.json"
PROGRESS = "progress.json"
"""The file of a checkpoint that says how many steps it holds, and the `sizes` of its other files."""
Record = Mapping[str, Any]
"""What is known of an epoch, or after some steps."""
_POLL_S = 0.3
# Looks for a checkpoint that is whole and stays long enough to be copied.
_TRIES = 10


@dataclass
class TrainingRun:
    """The folders of one training.

    Attributes:
        out: where its result goes. parts: everything that decides the weights, by name.
        counts: images and labels of each part. inputs: what is trained on.
        notes: what a reader of the results should know.
        sheet: the file of the result whose `provenance` names the training.
        records: the name of the records in training.json.
    """

    out: Path
    parts: dict[str, Any]
    counts: dict[str, dict[str, int]]
    inputs: Sequence[str]
    notes: Sequence[str]
    sheet: str
    records: str = "epochs"

    @property
    def folder(self) -> Path:
        """What belongs to the training and not to its result."""
        return self.out.with_name(f"{self.out.name}.training")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go unless another place is asked for."""
        return self.folder / "ray"

    def storage(self, elsewhere: str | None) -> str:
        """The folder or URI of this very training's checkpoints, here or in a place that many share."""
        return join(elsewhere or str(self.checkpoints), self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal where the same command gives the same weights."""
        text = json.dumps(self.parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prepare(self) -> dict[str, Any] | None:
        """Makes the folders this training's, or checks that they already are.

        Returns:
            What training.json holds, if the result is there already.

        Raises:
            UserError: if there is something else; nothing is changed then.
        """
        earlier = self.read()
        mine = earlier is not None and earlier.get("fingerprint") == self.fingerprint
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if mine and earlier is not None and self._is_done():
                return earlier
            raise UserError(f"--out {self.out}", "is there already, and not of this training", "give a new folder")
        if earlier is not None and not mine and earlier.get(self.records):
            changed = ", ".join(differences(earlier.get("parts", {}), self.parts)) or "the version"
            raise UserError(
                f"--out {self.out}",
                f"{self.folder} holds a training that differs ({changed})",
                "give the command that began it, another --out, or remove that folder",
            )
        try:
            if not mine and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out}", f"cannot be written ({error})", "give a folder you own") from None
        if not mine:
            self.write([])
        return None

    def write(self, history: Sequence[Record], **more: Any) -> dict[str, Any]:
        """Writes training.json whole, and returns what it holds."""
        content = {
            "fingerprint": self.fingerprint,
            "m3agiqa": __version__,
            "parts": self.parts,
            "inputs": list(self.inputs),
            "counts": self.counts,
            "notes": list(self.notes),
            **more,
            self.records: list(history),
        }
        new = self.folder / f"{SHEET_OF_TRAINING}.new"
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.folder / SHEET_OF_TRAINING)
        return content

    def keep_last(self, folder: Path) -> None:
        """Keeps what the training ended with.

        Args:
            folder: of its files; hidden ones are left out.
        """
        kept = self.folder / "last"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns(".*"))

    def read(self) -> dict[str, Any] | None:
        """What training.json holds, or None where there is none."""
        file = self.folder / SHEET_OF_TRAINING
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(str(self.folder), "is no training of m3agiqa", "give another --out") from None
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(str(file), f"cannot be read ({error})", "remove that folder, or mend it") from None

    def begun(self, elsewhere: str | None) -> tuple[pafs.FileSystem, str] | None:
        """A copy of the checkpoint with most steps of all earlier commands: its file system and path.

        Ray Train's own list of them is written in place, so that a driver that is killed may leave it empty.
        A copy, as the workers of that driver may live, and remove old checkpoints, for seconds after it.

        Raises:
            UserError: if none stays long enough to be copied.
        """
        store, path = locate(self.storage(elsewhere))
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                steps, last = max(((n, folder) for folder, n in _checkpoints(store, path).items()), default=(0, ""))
                if not steps:
                    return None
                copy = f"{path}/begun/{steps}-{time.time_ns()}"
                store.create_dir(copy, recursive=True)
                pafs.copy_files(last, copy, source_filesystem=store, destination_filesystem=store)
                if _checkpoints(store, copy).get(copy) == steps:
                    return store, copy
            time.sleep(_POLL_S)
        raise UserError(str(self.out), "its checkpoints change while they are read", "end the other training of it")

    def forget_checkpoints(self, elsewhere: str | None) -> None:
        """Removes this training's checkpoints."""
        store, path = locate(self.storage(elsewhere))
        if store.get_file_info(path).type == pafs.FileType.Directory:
            store.delete_dir(path)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _is_done(self) -> bool:
        try:
            provenance = json.loads((self.out / self.sheet).read_text(encoding="utf-8"))["provenance"]
            return bool(provenance["training"] == self.fingerprint)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Wording:
    """How one kind of training tells of its records.

    Attributes:
        going_on: a line for a training that goes on after these records; None: it is told otherwise.
        line: one for a record. at: the number that a record is tracked under. numbers: what is tracked, by name.
    """

    going_on: Callable[[list[Record]], str] | None
    line: Callable[[Record], str]
    at: Callable[[Record], int]
    numbers: Callable[[Record], dict[str, float]]


class Teller:
    """Tells of every record once, as it comes: a line, training.json and the trackers. A context manager.

    Args:
        values: the settings, for the trackers.
        history: gives the records so far, those of earlier commands included. notes: gives what is to be said beside.
        say: takes the lines.

    Raises:
        UserError: if a tracker's package is not installed.
    """

    def __init__(
        self,
        run: TrainingRun,
        wording: Wording,
        track: TrackConfig,
        values: Mapping[str, Any],
        history: Callable[[], list[Any]],
        say: Callable[[str], None],
        notes: Callable[[], list[str]] = list,
    ) -> None:
        self._run, self._wording, self._history, self._notes, self._say = run, wording, history, notes, say
        self._trackers = open_trackers(run.folder / "tensorboard", track.to, track.project, run.out.name, values)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="records", daemon=True)

    def __enter__(self) -> "Teller":
        earlier = (self._run.read() or {}).get(self._run.records, [])
        if earlier and self._wording.going_on is not None:
            self._say(self._wording.going_on(earlier))
        self._told = len(earlier)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        for tracker in self._trackers:
            tracker.close()

    def _watch(self) -> None:
        ended, noted = False, 0
        while not ended:
            ended = self._stop.wait(_POLL_S)
            for note in (notes := self._notes())[noted:]:
                self._say(f"note: {note}")
            noted = max(noted, len(notes))
            history = self._history()
            new = history[self._told :]
            if new:
                # First, so that a command that goes on knows of all that was said.
                self._told = len(history)
                self._run.write(history)
            for record in new:
                self._say(self._wording.line(record))
                for tracker in self._trackers:
                    tracker.log(self._wording.at(record), self._wording.numbers(record))


def _checkpoints(store: pafs.FileSystem, path: str) -> dict[str, int]:
    """Folders at or under a path that hold a whole checkpoint, with its number of steps."""
    folders: dict[str, dict[str, int]] = {}
    for info in store.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True)):
        if info.type == pafs.FileType.File:
            folders.setdefault(info.path.rpartition("/")[0], {})[info.base_name] = info.size
    found: dict[str, int] = {}
    for folder, sizes in folders.items():
        with contextlib.suppress(OSError):
            if PROGRESS in sizes:
                with store.open_input_stream(f"{folder}/{PROGRESS}") as stream:
                    found[folder] = steps_saved(stream.read(), sizes)
    return {folder: steps for folder, steps in found.items() if steps}


def steps_of(copy: str) -> int:
    """Steps of a checkpoint that `TrainingRun.begun` has copied, by its path."""
    return int(copy.rpartition("/")[2].partition("-")[0])


def steps_saved(progress: bytes, sizes: Mapping[str, int]) -> int:
    """Steps that a checkpoint holds; 0 if it is not whole.

    Args:
        progress: what its `PROGRESS` holds. sizes: of its files, by name.
    """
    try:
        found = json.loads(progress)
        whole = all(sizes.get(name) == size for name, size in found["sizes"].items())
        return int(found["step"]) if whole else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def out_folder(out: str) -> Path:
    """The folder of the result.

    Raises:
        UserError: for a URI.
    """
    return local_out(out, "give a local folder; ray.storage may be a URI for the checkpoints")


def of_epochs(epochs: int) -> Wording:
    """How the training of a predictor tells of its epochs.

    Args:
        epochs: the most there can be.
    """
    return Wording(
        going_on=lambda records: f"going on after epoch {len(records)}",
        line=lambda record: epoch_line(cast(EpochRecord, record), epochs),
        at=lambda record: int(record["epoch"]),
        numbers=lambda record: numbers_of(cast(EpochRecord, record)),
    )


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """`epoch  3/30  loss 0.143  quality SRCC 0.912 PLCC 0.920 RMSE 0.31  4.2s  best`."""
    width = len(str(epochs))
    parts = [f"epoch {record['epoch']:>{width}}/{epochs}", f"loss {record['loss']:.4f}", validation_line(record)]
    return "  ".join([*parts, f"{record['seconds']:.1f}s", *(["best"] if record["best"] else [])])


def validation_line(record: EpochRecord) -> str:
    """`quality SRCC 0.912 PLCC 0.920 RMSE 0.31`, of each output."""
    parts = []
    for name, one in record["validation"].items():
        srcc, plcc = ("--" if value is None else f"{value:.3f}" for value in (one["srcc"], one["plcc"]))
        parts.append(f"{name} SRCC {srcc} PLCC {plcc} RMSE {one['rmse']:.2f}")
    return "  ".join(parts)


def summary(done: Mapping[str, Any], out: str) -> list[str]:
    """What to say at the end, from what training.json holds."""
    best = next(record for record in done["epochs"] if record["epoch"] == done["best_epoch"])
    lines = [f"best epoch {best['epoch']} of {len(done['epochs'])}, on validation: {validation_line(best)}"]
    for name, one in done["calibration"].items():
        samples = f"from {one['samples']} held-out labels"
        lines.append(f"{name} interval at level {one['level']:g}: +/- {one['half_width']:.2f} ({samples})")
    if not done["calibration"]:
        lines.append("no intervals (calibration.share=0)")
    return [*lines, f"predictor: {out} ({duration(done['seconds'])}; logs in {out.rstrip('/')}.training)"]


def numbers_of(record: EpochRecord) -> dict[str, float]:
    """The numbers of one epoch by the names under which they are tracked."""
    found = {"loss": record["loss"], "learning_rate": record["learning_rate"], "seconds": record["seconds"]}
    for name, one in record["validation"].items():
        found |= {f"{name}/rmse": one["rmse"], f"{name}/mae": one["mae"]}
        for key, value in (("srcc", one["srcc"]), ("plcc", one["plcc"])):
            if value is not None:
                found[f"{name}/{key}"] = value
    return found
