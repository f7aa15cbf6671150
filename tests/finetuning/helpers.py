"""Small corpora with a teacher's answers, small random models, and trainers without Ray."""

import csv
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS, Aspect
from m3agiqa.corpus import open_corpus
from m3agiqa.distil_config import RatingsConfig
from m3agiqa.engine.prompting import load_processor, prompt_builder
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.encoding import Encoder, pad_id
from m3agiqa.finetuning.learner import Learner, load_model
from m3agiqa.finetuning.parts import Share
from m3agiqa.finetuning.pictures import Pictures
from m3agiqa.finetuning.talks import Columns, read_talks
from m3agiqa.finetuning.trainer import Trainer, encoded_parts
from m3agiqa.predictor.group import Alone
from m3agiqa.settings import load
from tests.corpora import picture

SIZES = ((48, 32), (64, 64), (150, 70), (40, 120))
FAST = (
    "compute.precision=fp32",
    "compute.attention=eager",
    "data.split_by=id",
    "optim.learning_rate=0.01",
    "optim.batch_size=4",
    "optim.micro_batch=4",
    "optim.epochs=2",
    "lora.rank=8",
    "lora.alpha=16",
    "proof.engine=transformers",
    "proof.images=2",
    "proof.max_description_tokens=12",
)
"""Settings of a training that takes seconds."""


def write_model(folder: Path, *, tiles: bool = False) -> Path:
    """A random model of 64 x 64 pixels; with `tiles` it cuts larger images up."""
    from m3agiqa.tiny.architecture import Size, write_random_model

    size = Size(
        image_size=64, vision_width=48, vision_layers=1, vision_mlp=64, vision_heads=2,
        text_width=64, text_layers=2, text_mlp=96, text_head_dim=32,
    )  # fmt: skip
    write_random_model(folder, size, vocabulary=512)
    weights = load_file(folder / "model.safetensors")
    # A head of random weights this small can make no token likely, whatever it is given.
    weights["lm_head.weight"] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if tiles:
        file = folder / "processor_config.json"
        settings = json.loads(file.read_text())
        settings["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 128}}
        file.write_text(json.dumps(settings))
    return folder


def rows(count: int, aspects=("quality", "authenticity"), sizes=SIZES) -> list[dict]:
    """Rows with answers that tell of the prompt, and scores in the middle of the word's bin."""
    made = []
    for i in range(count):
        row = {
            "image_path": f"{i}.png",
            "id": f"r{i}",
            "prompt": f"prompt {chr(97 + i % 26)}",
            "_size": sizes[i % len(sizes)],
        }
        for a, aspect in enumerate(aspects):
            word = RATING_WORDS[(i + a) % 5]
            row |= {
                f"teacher_{aspect}_description": f"It is {chr(97 + i % 26)}{'!' * a}.",
                f"teacher_{aspect}_rating": word,
                f"mos_{aspect}": RATING_LEVELS[(i + a) % 5],
            }
        made.append(row)
    return made


def write(folder: Path, made: list[dict], pictures: bool = True) -> str:
    """Writes the images and a manifest, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in dict.fromkeys(name for row in made for name in row) if name != "_size"]
    for i, row in enumerate(made):
        if pictures:
            picture(*row.get("_size", SIZES[0]), seed=i).save(folder / row["image_path"])
    with (folder / "corpus.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made)
    return str(folder / "corpus.csv")


def settings(model: Path | str, *more: str) -> FinetuneConfig:
    return load(FinetuneConfig, None, [*FAST, f"model.path={model}", *more])


def talks_of(*inputs: str, columns: Columns | None = None, ratings: RatingsConfig | None = None, **options):
    opened = {uri: open_corpus(uri, lenient=True, **options) for uri in inputs}
    return read_talks(opened, columns or Columns(), ratings)


def make(config: FinetuneConfig, manifest: str, judged: int = 2) -> Trainer:
    """A trainer as a worker makes it, without Ray; the last images judge."""
    talks = talks_of(manifest, columns=Columns(labels={Aspect.QUALITY: "mos_quality"}))
    held = len(talks.pictures) - judged
    train = [talk for talk in talks.talks if talk.picture < held]
    share = Share(dict(enumerate(talks.pictures)), train, [talk for talk in talks.talks if talk.picture >= held])
    folder = Path(config.model.path)
    processor = load_processor(folder, config.model)
    builder = prompt_builder(folder, config.model, processor)
    encoder = Encoder(builder, config.data.conversation, config.loss.rating)
    model = load_model(folder, config.model, config.compute.attention, text_only=False)
    learner = Learner(model, config, encoder.word_ids, builder.image_token_id)
    look = learner.look if learner.frozen_eye and learner.sees else None
    room = {"cache_mib": config.data.cache_mib, "readers": 2}
    pictures = Pictures(share.pictures, talks.shards, config.images, processor, builder.image_token, look=look, **room)
    assert pictures.open() == []
    parts = encoded_parts(share, encoder, pictures, 4096)
    return Trainer(config, learner, parts[0], parts[1], pictures.get, Alone(), pad_id(builder))
