"""Fine-tunes a multimodal model by LoRA with Ray Train: corpora of conversations -> an adapter that the engines load.

Every worker reads its images once and keeps what fits. Order, dropout and data of a step hang on the seed and the
step's number, and checkpoints are written every few hundred steps: a training whose worker or driver was killed
goes on from the last of them to the same weights.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray.train.torch import get_device
from safetensors.torch import load_file

from m3agiqa.aspects import Aspect
from m3agiqa.connection import connect
from m3agiqa.corpus import Corpus, Shard, open_corpus
from m3agiqa.corpus.files import absolute
from m3agiqa.distil.output import taught_from
from m3agiqa.engine.prompting import load_processor, prompt_builder
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.card import SHEET, write_adapter, write_card, write_sheet
from m3agiqa.finetuning.encoding import Encoder, pad_id
from m3agiqa.finetuning.figures import figures_line
from m3agiqa.finetuning.learner import Learner, load_model
from m3agiqa.finetuning.parts import Share, Split, shares, split
from m3agiqa.finetuning.pictures import Pictures
from m3agiqa.finetuning.proof import Exam, exam, proof_lines, prove
from m3agiqa.finetuning.talks import Bad, Columns, Talks, read_talks
from m3agiqa.finetuning.trainer import BEST, LAST, Record, Trainer, encoded_parts, write_checkpoint
from m3agiqa.models import context_length, model_digest, model_folder
from m3agiqa.predictor.group import Alone, Group, Processes
from m3agiqa.progress import duration
from m3agiqa.ray_training import check_batch, check_resources, fit, open_board
from m3agiqa.seen import read as read_seen
from m3agiqa.seen import union
from m3agiqa.tracking import check_trackers
from m3agiqa.training_run import Record as AnyRecord
from m3agiqa.training_run import Teller, TrainingRun, Wording, out_folder, steps_of

# Bad rows that are named one by one.
_MOST_NAMED = 100


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know; it crosses to other machines."""

    config: FinetuneConfig
    shares: list[Any]
    """References to each worker's `Share`."""
    shards: list[Shard]
    skip_bad: bool
    board: Any
    begun: Any
    """The checkpoint of an earlier command, to go on from, or None."""


def finetune(
    config: FinetuneConfig,
    inputs: Sequence[str],
    out: str,
    columns: Columns | None = None,
    *,
    validation: Sequence[str] = (),
    skip_bad: bool = False,
    verbose: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Trains one adapter, or one for each aspect; the same call goes on where an earlier one was stopped.

    Args:
        inputs: corpora of conversations. validation: others that choose the best step, instead of a share.
        out: folder for the adapter; with `lora.adapters=per_aspect` there is one in it for each aspect.
        columns: those that do not have the usual names.
        skip_bad: go on without rows that cannot be used; else they are an error. say: takes lines of progress.

    Returns:
        Folder of each adapter -> what its training.json holds.

    Raises:
        UserError: for inputs, columns, an output or a configuration that cannot be used; before any step is taken.
    """
    columns = columns or Columns()
    _check_config(config, columns)
    corpora = _open(config, [*inputs, *validation], say)
    talks = read_talks(corpora, columns, config.ratings)
    _tell_bad(talks.bad, skip_bad, say)
    for note in talks.notes():
        say(f"note: {note}")
    folder = out_folder(out)
    whole = {folder: talks.aspects}
    each = {folder / str(aspect): (aspect,) for aspect in talks.aspects}
    wanted = each if config.lora.adapters == "per_aspect" else whole
    # All of them first: what cannot be split is refused before an adapter is trained.
    splits = [split(talks, config, aspects, len(inputs), validation) for aspects in wanted.values()]
    ready = [(made, shares(made, talks.pictures, config.ray.workers)) for made in splits]
    done = {}
    for (where, aspects), parts in zip(wanted.items(), ready, strict=True):
        if where != folder:
            say(f"{', '.join(aspects)}:")
        done[str(where)] = _train(config, list(corpora), talks, *parts, where, aspects, skip_bad, verbose, say)
    return done


def _check_config(config: FinetuneConfig, columns: Columns) -> None:
    low, high = columns.scale
    if not low < high:
        raise UserError(f"--scale {low:g} {high:g}", "does not go up", "give the lowest score, then the highest")
    check_batch(config.optim.batch_size, config.ray)
    check_trackers(config.track.to)
    if config.compute.parallel == "fsdp" and config.ray.workers == 1:
        raise UserError(
            "compute.parallel=fsdp", "spreads the model over workers, and there is one", "raise ray.workers"
        )


def _open(config: FinetuneConfig, inputs: Sequence[str], say: Callable[[str], None]) -> dict[str, Corpus]:
    found = {}
    for uri in inputs:
        if absolute(uri) in found:
            raise UserError(f"--input {uri}", "is given twice", "give it once")
        # A distillation names the images where they were for it.
        access = config.access.model_copy(update={"roots": (*config.access.roots, *taught_from(uri))})
        found[absolute(uri)] = corpus = open_corpus(uri, **config.corpus.model_dump(), access=access, lenient=True)
        for note in corpus.notes:
            say(f"note: {note}")
    return found


def _tell_bad(bad: Sequence[Bad], skip_bad: bool, say: Callable[[str], None]) -> None:
    for one in bad[:_MOST_NAMED]:
        say(f"note: {'skipped ' if skip_bad else ''}{one}")
    if bad and not skip_bad:
        raise UserError(*_refusal(bad))
    if bad:
        say(f"note: {len(bad)} bad rows left out")


def _refusal(bad: Sequence[Bad]) -> tuple[str, str, str]:
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    rule = f"{'; '.join(map(str, bad[:3]))}{more}"
    return f"{len(bad)} rows cannot be trained on", rule, "mend them, or leave them out with --skip-bad"


def _train(
    config: FinetuneConfig,
    inputs: Sequence[str],
    talks: Talks,
    made: Split,
    found: Sequence[Share],
    out: Path,
    aspects: tuple[Aspect, ...],
    skip_bad: bool,
    verbose: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains one adapter. Returns what its training.json holds."""
    started = time.monotonic()
    model = model_folder(config.model)
    base = model_digest(model)
    # Not how many workers: they take nearly the same steps, so that fewer or more may go on. Nor bins: data has words.
    settings = config.model_dump(mode="json", exclude={"ray", "track", "proof", "access", "ratings"})
    decides = {"config": settings, "base": base, "data": made.digest(talks.pictures), "skip_bad": skip_bad}
    run = TrainingRun(out, decides, made.counts(), inputs, made.notes, SHEET, "records")
    if (done := run.prepare()) is not None:
        return done
    for note in run.notes:
        say(f"note: {note}")
    connect(config.ray.address, int(config.ray.workers * config.ray.cpus) + 2, verbose=verbose)
    use_gpu = check_resources(config.ray)
    board = open_board()
    begun = run.begun(config.ray.storage)
    checkpoint = None
    if begun is not None:
        checkpoint = ray_train.Checkpoint(begun[1], begun[0])
        say(f"going on after step {steps_of(begun[1])}")
    job = _Job(config, [ray.put(share) for share in found], talks.shards, skip_bad, board, checkpoint)
    wording, values = _wording(config), config.model_dump(mode="json")
    history = partial(_ask, board.history)
    with Teller(run, wording, config.track, values, history, say, partial(_ask, board.notes)):
        result = fit(_work, job, run, config.ray, use_gpu=use_gpu, verbose=verbose)
    asked = exam(made.validation, talks.pictures, talks.shards, config.proof.images)
    # The proof is of this adapter, and what is said of it goes into its card: it is not done before.
    new = run.folder / "adapter"
    shutil.rmtree(new, ignore_errors=True)
    targets, digests = result.return_value["targets"], result.return_value["digests"]
    met = union([read_seen(model), made.trained_on(talks.pictures, digests)])
    with result.checkpoint.as_directory() as folder:
        write_adapter(new, load_file(Path(folder) / BEST), targets, config, met)
        with tempfile.TemporaryDirectory() as last:
            write_adapter(Path(last), load_file(Path(folder) / LAST), targets, config, met)
            run.keep_last(Path(last))
    proof = _prove(config, new, asked, use_gpu)
    for line in proof_lines(proof):
        say(line)
    done = _finish(run, config, new, aspects, base, history(), proof, time.monotonic() - started)
    run.forget_checkpoints(config.ray.storage)
    return done


def _ask(method: Any) -> Any:
    return ray.get(method.remote())


def _prove(config: FinetuneConfig, adapter: Path, asked: Exam, use_gpu: bool) -> dict[str, Any]:
    """Scores with the adapter, in a process of its own with a GPU of its own."""
    task = ray.remote(num_cpus=config.ray.cpus, num_gpus=1 if use_gpu else 0, max_retries=0)(_prove_there)
    found = ray.get(task.remote(config, _files(adapter), asked))
    if isinstance(found, UserError):
        raise found
    return found


def _prove_there(config: FinetuneConfig, files: Mapping[str, bytes], asked: Exam) -> dict[str, Any] | UserError:
    # On a node that may not see the driver's disk; Ray hands on an exception wrapped in tracebacks, but not a value.
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return prove(config, Path(folder), asked)
        except UserError as error:
            return error


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _finish(
    run: TrainingRun,
    config: FinetuneConfig,
    new: Path,
    aspects: Sequence[Aspect],
    base: str,
    history: Sequence[Record],
    proof: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Makes a whole folder of the adapter, and puts it where it belongs."""
    best = max((record for record in history if record.get("best")), key=lambda record: record["step"])
    facts: dict[str, Any] = {"base": base, "aspects": [str(a) for a in aspects], "inputs": run.inputs}
    facts |= {"counts": run.counts, "validation": best["validation"], "step": best["step"], "notes": run.notes}
    write_card(new, config, facts | {"steps": history[-1]["step"], "proof": proof})
    provenance = {"training": run.fingerprint, "step": best["step"], "validation": best["validation"], **run.parts}
    write_sheet(new, config, provenance)
    more = {"best_step": best["step"], "proof": dict(proof), "seconds": round(seconds, 3), "finished": True}
    content = run.write(history, **more)
    with contextlib.suppress(OSError):
        run.out.rmdir()
    run.out.parent.mkdir(parents=True, exist_ok=True)
    new.replace(run.out)
    return content


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """A worker: readies its share, goes on from the last checkpoint, and trains to the end.

    Returns:
        `targets`: the pattern of the modules that were changed; `digests`: SHA-256 of all workers' image files, by
        number; `refusal`: the arguments of a `UserError`, the same in all workers, or None.
    """
    job: _Job = settings["job"]
    context = ray_train.get_context()
    rank = context.get_world_rank()
    group: Group = Processes() if context.get_world_size() > 1 else Alone()
    try:
        trainer, learner, digests = _trainer(job, ray.get(job.shares[rank]), group)
        if (checkpoint := ray_train.get_checkpoint() or job.begun) is not None:
            with checkpoint.as_directory() as folder:
                trainer.load(Path(folder))
        if rank == 0:
            ray.get(job.board.begin.remote(trainer.progress.history))
        reports = _Reports(job.board, trainer, rank)
        trainer.run(reports.told, reports.save)
        if not reports.saved:
            reports.save()  # all was done before; the driver looks for a checkpoint of this run
    except UserError as error:
        return {"targets": "", "digests": {}, "refusal": (error.value, error.rule, error.cure)}
    return {"targets": learner.targets, "digests": digests, "refusal": None}


class _Reports:
    """Hands on records, and checkpoints to Ray."""

    def __init__(self, board: Any, trainer: Trainer, rank: int) -> None:
        self._board, self._trainer, self._rank = board, trainer, rank
        self.saved = False

    def told(self, record: Record) -> None:
        """A record is there."""
        if self._rank == 0:
            ray.get(self._board.add.remote(record))

    def save(self) -> None:
        """A checkpoint is due; all workers come here."""
        content, step = self._trainer.checkpoint(), {"step": self._trainer.progress.step}
        self.saved = True
        if self._rank:
            ray_train.report(step)
            return
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), content)
            ray_train.report(step, checkpoint=ray_train.Checkpoint.from_directory(folder))


def _trainer(job: _Job, share: Share, group: Group) -> tuple[Trainer, Learner, dict[int, str]]:
    """The trainer of one worker, its images ready, and the digests of all workers' images.

    Raises:
        UserError: for rows that cannot be used, in all workers alike; and for what the model cannot be.
    """
    config, device = job.config, get_device()
    folder, text_only = model_folder(config.model), config.corpus.text_only
    processor = None if text_only else load_processor(folder, config.model)
    builder = prompt_builder(folder, config.model, processor, text_only=text_only)
    encoder = Encoder(builder, config.data.conversation, config.loss.rating)
    model = load_model(folder, config.model, config.compute.attention, text_only=text_only)
    image_token_id = None if text_only else builder.image_token_id
    learner = Learner(model, config, encoder.word_ids, image_token_id).to(device)
    pictures, bad = None, []
    if not text_only:
        look = learner.look if learner.frozen_eye and learner.sees else None
        room = {"cache_mib": config.data.cache_mib, "readers": config.data.readers}
        pictures = Pictures(
            share.pictures, job.shards, config.images, processor, builder.image_token, look=look, **room
        )
        bad = pictures.open()
    train, validation, long = encoded_parts(share, encoder, pictures, context_length(folder, config.model))
    _agree_on_bad([*bad, *long], [bool(train.talks), bool(validation.talks)], job, group)
    get = None if pictures is None else pictures.get
    mine = {} if pictures is None else pictures.digests
    digests = {number: digest for own in group.gather_objects(mine) for number, digest in own.items()}
    return Trainer(config, learner, train, validation, get, group, pad_id(builder)), learner, digests


def _agree_on_bad(bad: Sequence[Bad], some: list[bool], job: _Job, group: Group) -> None:
    """Tells of bad rows of all workers, and refuses them unless they may be skipped; all come to the same."""
    everywhere = group.gather_objects((list(bad), some))
    all_bad = [one for share, _ in everywhere for one in share]
    if all_bad and group.rank == 0:
        notes = [f"{'skipped ' if job.skip_bad else ''}{one}" for one in all_bad[:_MOST_NAMED]]
        ray.get(job.board.note.remote(notes))
    if all_bad and not job.skip_bad:
        raise UserError(*_refusal(all_bad))
    if not all(all(some) for _, some in everywhere):
        rule = "too few conversations are left for each worker to have some of both parts"
        raise UserError(f"ray.workers={group.size}", rule, "mend bad rows, or ask for fewer workers")


def _wording(config: FinetuneConfig) -> Wording:
    """How a fine-tuning tells of its records."""

    def line(record: AnyRecord) -> str:
        if "validation" in record:
            best = "  best" if record["best"] else ""
            return f"step {record['step']} validation: {figures_line(record['validation'])}{best}"
        speed = f"{record['conversations_per_second']:.1f} conversations/s"
        epoch = f"epoch {record['epoch']}/{config.optim.epochs}"
        return f"step {record['step']} {epoch}  loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}  {speed}"

    def numbers(record: AnyRecord) -> dict[str, float]:
        if "validation" not in record:
            return {name: float(record[name]) for name in ("loss", "learning_rate", "conversations_per_second")}
        return {
            f"{aspect}/{name}": float(value)
            for aspect, one in record["validation"].items()
            for name, value in one.items()
            if name != "conversations" and value is not None
        }

    return Wording(
        going_on=None,  # records may be ahead of the checkpoint
        line=line,
        at=lambda record: int(record["step"]),
        numbers=numbers,
    )


def summary(done: Mapping[str, Mapping[str, Any]], config: FinetuneConfig) -> list[str]:
    """What to say at the end, from what `finetune` returned."""
    lines = []
    for folder, one in done.items():
        best = next(r for r in one["records"] if r["step"] == one["best_step"] and "validation" in r)
        steps = one["records"][-1]["step"]
        lines.append(f"best step {best['step']} of {steps}, on validation: {figures_line(best['validation'])}")
        lines.append(f"adapter: {folder} ({duration(one['seconds'])}; logs in {folder}.training)")
    named = {Path(folder).name: folder for folder in done}
    value = next(iter(done)) if config.lora.adapters == "joint" else str(named).replace("'", "")
    return [*lines, f"to score with it: --set model.path={config.model.path} 'model.adapters={value}'"]
