"""A finished adapter in the engine that will use it: whether it loads, and how good what it says by itself is."""

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3agiqa.adapters import check_for_vllm, load_adapters
from m3agiqa.adapters.vllm import TOWER_LORA
from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS, Aspect, expected_score
from m3agiqa.config import RunConfig
from m3agiqa.corpus import Shard
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome, create_engine
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.figures import Figures, Judged, figures, figures_line
from m3agiqa.finetuning.pictures import embedded_images
from m3agiqa.finetuning.talks import Picture, Talk
from m3agiqa.images import ImageRejected, decode
from m3agiqa.models import model_config_json, model_folder

# No word of the five, and none that is one off.
_NO_WORD = -9


@dataclass(frozen=True)
class Exam:
    """What an adapter is asked.

    Attributes:
        talks: of the images, the right answers. pictures: by number. shards: where embedded images are read.
    """

    talks: Sequence[Talk]
    pictures: Mapping[int, Picture]
    shards: Sequence[Shard]


def exam(talks: Sequence[Talk], pictures: Sequence[Picture], shards: Sequence[Shard], images: int) -> Exam:
    """An exam on some images of the validation part, evenly spread."""
    numbers = list(dict.fromkeys(talk.picture for talk in talks))
    chosen = set(numbers if len(numbers) <= images else [numbers[i * len(numbers) // images] for i in range(images)])
    asked = [talk for talk in talks if talk.picture in chosen]
    return Exam(asked, {number: pictures[number] for number in chosen}, shards)


def prove(config: FinetuneConfig, adapter: Path, exam: Exam) -> dict[str, Any]:
    """Loads an adapter as a scoring run does, and lets it describe and rate some images.

    Returns:
        `engine`, `figures` (of its own descriptions, by aspect), `images`, `unscored`: those that were not, and
        `instead`: why it is not the engine that `auto` would rather take, or None.

    Raises:
        UserError: if the engine does not take the adapter.
        RuntimeError: if it scores no image.
    """
    aspects = tuple(dict.fromkeys(talk.aspect for talk in exam.talks))
    run, instead = run_config(config, adapter, aspects)
    by_picture: dict[int, dict[Aspect, Talk]] = {}
    for talk in exam.talks:
        by_picture.setdefault(talk.picture, {})[talk.aspect] = talk
    items, asked = [], []
    embedded = dict(embedded_images(exam.pictures, exam.shards))
    for number, talks in by_picture.items():
        picture = exam.pictures[number]
        try:
            pixels = None
            if not config.corpus.text_only:
                data = embedded[number] if picture.uri is None else picture.access.fetch(picture.uri)
                pixels = decode(data, **config.images.model_dump()).pixels
        except (OSError, ImageRejected):
            continue  # an image that training has skipped, or that is gone by now
        items.append(Item(pixels, picture.prompt, tuple(talks)))
        asked.append(talks)
    outcomes = asyncio.run(_assess(run, items))
    judged = [one for talks, outcome in zip(asked, outcomes, strict=True) for one in _judged(talks, outcome)]
    unscored = [str(one) for one in outcomes if isinstance(one, ItemRejected | ItemFailed)]
    if not judged:
        raise RuntimeError(
            f"the {run.engine.kind} engine scored no image ({unscored[0] if unscored else 'none is left'})"
        )
    found = {"engine": run.engine.kind, "images": len(items) - len(unscored), "unscored": len(unscored)}
    return found | {"figures": figures(judged), "instead": instead}


def run_config(config: FinetuneConfig, adapter: Path, aspects: Sequence[Aspect]) -> tuple[RunConfig, str | None]:
    """The configuration of a scoring run with the adapter, on the engine that `proof.engine` asks for.

    Returns:
        with it, why vLLM is not that engine where `auto` would rather take it.

    Raises:
        UserError: if vLLM is asked for and cannot apply the adapter.
    """
    folder = model_folder(config.model)
    model = config.model.model_copy(update={"adapters": str(adapter)})
    trains_eye = config.lora.vision or config.lora.connector
    tower = trains_eye and bool(TOWER_LORA & set(model_config_json(folder).get("architectures") or []))
    kind, instead = config.proof.engine, None
    if kind != "transformers":
        (loaded,) = set(load_adapters(str(adapter), folder).values())
        try:
            check_for_vllm(loaded, folder, tower=tower)
            there = importlib.util.find_spec("vllm") is not None
            instead = None if there or kind == "vllm" else "is not installed"
        except UserError as error:
            if kind == "vllm":
                raise
            instead = f"cannot apply the adapter ({error.rule}); {error.cure}"
        kind = "vllm" if instead is None else "transformers"
    base = RunConfig()
    engine = {"kind": kind, "vllm_args": {"enable_tower_connector_lora": True} if tower and kind == "vllm" else {}}
    scoring: dict[str, Any] = {"aspects": tuple(aspects), "conversation": config.data.conversation}
    scoring |= {"max_description_tokens": config.proof.max_description_tokens}
    run = base.model_copy(
        update={
            "model": model,
            "engine": base.engine.model_copy(update=engine),
            "scoring": base.scoring.model_copy(update=scoring),
            "corpus": config.corpus,
            "images": config.images,
        }
    )
    return run, instead


async def _assess(run: RunConfig, items: Sequence[Item]) -> list[Outcome]:
    engine = create_engine(run)
    try:
        return await engine.assess(items)
    finally:
        engine.close()


def _judged(talks: Mapping[Aspect, Talk], outcome: Outcome) -> list[Judged]:
    if isinstance(outcome, ItemRejected | ItemFailed):
        return []
    found = []
    for aspect, assessment in outcome.items():
        talk = talks[aspect]
        word = RATING_WORDS.index(talk.word)
        said = _NO_WORD if assessment.rating is None else RATING_WORDS.index(assessment.rating)
        if assessment.rating_probs is None:
            continue
        score = RATING_LEVELS[word] if talk.score is None else talk.score
        found.append(Judged(aspect, 0.0, 0.0, word, said, expected_score(assessment.rating_probs), score))
    return found


def proof_lines(proof: Mapping[str, Any]) -> list[str]:
    """`vllm loaded it and scored 8 images: quality right 0.50 ...`, after a note if need be, from `prove`."""
    said: dict[str, Figures] = proof["figures"]
    note = [f"note: proof.engine=auto takes transformers: vLLM {proof['instead']}"] if proof["instead"] else []
    return [*note, f"{proof['engine']} loaded it and scored {proof['images']} images with it: {figures_line(said)}"]
