"""`python -m benchmarks.agiqa FOLDER`: real human scores from text alone, as JSON lines.

FOLDER holds `data.csv` of AGIQA-3k (Li et al., arXiv 2306.04717; MIT, github.com/lcysyzxdc/AGIQA-3k-Database):
2,982 images by name, their prompts and human scores; and `train_quality.json` (2,385 conversations) and
`test_quality_responses.json` (597) of M3-AGIQA (MIT, github.com/strawhatboy/M3-AGIQA). There are no images
in it: a language model of this benchmark's own, trained from scratch on the training conversations, reads
[question 1 with the prompt, description, question 2], and our xLSTM head learns the human quality score from its
last hidden states. No answer to question 2 is ever among them.

What leaks where. The training descriptions are a teacher's that had been shown the human score; so are the
answers within the test conversations, which are not used. A test description is `response_0`, by a fine-tuned
MLLM that saw the image and no score. In the published split every test prompt is also a training prompt;
prompts alone, however, tell next to nothing of quality here. `disjoint` is the honest part: five folds over
the prompts, the 597 test images of which are scored by a model that saw no conversation of their prompts.

The rule of stopping: everything trains for a number of steps that was fixed beforehand, and the last weights
count: the language model for six epochs, the head for ten readings of every conversation. Of the training
prompts a tenth is the validation part, drawn by the seed. Settings were chosen on it (`--validation-only`), by models
that had not learnt from it; the models that are tested learn with these settings from all training conversations,
validation part included, as the baseline does. Nothing is chosen on the test part. The seed also decides first
weights, orders and hidden tokens. TF-IDF (1-2-grams) + ridge on the descriptions is the baseline.

All seconds are CPU seconds.
"""

import argparse
import csv
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import agiqa_lm
from m3agiqa.predictor.metrics import agreement
from m3agiqa.predictor.train import Examples, fit
from m3agiqa.train_config import TrainConfig

FOLDS = 5
_VALIDATION_SHARE = 0.1
_HIDDEN = 0.2
_PIECES = re.compile(r"(?:\s*\S+){1,6}")
_T = TypeVar("_T")
_FIGURES = ("srcc", "plcc", "rmse")


@dataclass(frozen=True)
class Conversation:
    """One image's.

    Attributes:
        image: its name.
        opening, closing, question: the wording around the prompt and the description; the same for all.
    """

    image: str
    prompt: str
    description: str
    score: float
    opening: str
    closing: str
    question: str

    @property
    def asked(self) -> str:
        """The first question."""
        return f"{self.opening}{self.prompt}{self.closing}"

    @property
    def text(self) -> str:
        """All that comes before the rating word."""
        return f"{self.asked}{self.description}{self.question}"

    @property
    def wording(self) -> tuple[str, ...]:
        """What all conversations have in common; the second question in pieces of a few words.

        They are read after the description, so each holds what the model makes of all of it.
        """
        return (self.opening, self.closing, *_PIECES.findall(self.question))


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Attributes:
        readings: how often the head sees each conversation, each time with other tokens hidden from the model.
    """

    lm: agiqa_lm.Recipe
    readings: int
    head: TrainConfig


PLAN = Plan(
    agiqa_lm.Recipe(),
    10,
    TrainConfig.model_validate(
        {
            "head": {"width": 64, "blocks": 2, "slstm_at": (1,), "hidden": 32, "dropout": 0.4},
            "loss": {"mse": 1.0, "plcc": 1.0},
            "optim": {"learning_rate": 1e-3, "weight_decay": 0.05, "epochs": 1},
        }
    ),
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agiqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the published split; 0: folds only")
    parser.add_argument("--disjoint-seeds", type=int, default=1, help="seeds of the prompt-disjoint folds")
    parser.add_argument("--validation-only", action="store_true", help="leave the test part alone: to choose settings")
    parser.add_argument("--members", type=int, default=PLAN.lm.members, help="networks of the language model")
    parser.add_argument("--fast", action="store_true", help="one seed, one epoch, no folds: does it run at all")
    args = parser.parse_args()
    plan, seeds, rounds = replace(PLAN, lm=replace(PLAN.lm, members=args.members)), args.seeds, args.disjoint_seeds
    if args.fast:
        plan, seeds, rounds = replace(plan, lm=replace(plan.lm, epochs=1), readings=1), 1, 0
    learnt, asked = read(args.folder)
    if args.validation_only:
        if not seeds:
            parser.error("--validation-only is of the published split; give --seeds 1 or more")
        asked, rounds = [], 0
    if seeds:
        published(learnt, asked, plan, seeds)
    if rounds:
        disjoint(learnt, asked, plan, rounds)


def published(learnt: Sequence[Conversation], asked: Sequence[Conversation], plan: Plan, seeds: int) -> None:
    """The published split: a line for each seed, and one with their mean and the baseline."""
    found, both = [], []
    for seed in range(seeds):
        scores, facts = measure(learnt, asked, plan, seed)
        found.append(figures(scores, asked))
        both.append(facts.get("with_rating_word", {}))
        show(split="published", seed=seed, **found[-1], **facts)
    if asked:
        baseline = figures(tfidf_ridge(learnt, asked), asked)
        means = summary(found) | {"with_rating_word": summary(both)}
        show(split="published", images=len(asked), seeds=seeds, **means, tfidf_ridge=baseline)


def disjoint(learnt: Sequence[Conversation], asked: Sequence[Conversation], plan: Plan, seeds: int) -> None:
    """Folds over the prompts: a line for each, then all images together, against the baseline."""
    folds = deal(sorted({one.prompt for one in asked}), FOLDS, 0)
    pooled, by_fold, both_by_fold, base_by_fold = [], [], [], []
    base = torch.zeros(len(asked))
    for seed in range(seeds):
        scores = torch.zeros(len(asked))
        for number, prompts in enumerate(folds):
            rest = [one for one in learnt if one.prompt not in prompts]
            rows = [i for i, one in enumerate(asked) if one.prompt in prompts]
            part = [asked[i] for i in rows]
            scores[rows], facts = measure(rest, part, plan, FOLDS * seed + number)
            by_fold.append(figures(scores[rows], part))
            both_by_fold.append(facts["with_rating_word"])
            if not seed:
                base[rows] = tfidf_ridge(rest, part)
                base_by_fold.append(figures(base[rows], part))
            show(split="disjoint", seed=seed, fold=number, images=len(part), **by_fold[-1], **facts)
        pooled.append(figures(scores, asked))
    show(
        split="disjoint",
        images=len(asked),
        seeds=seeds,
        **summary(pooled),
        by_fold=summary(by_fold) | {"with_rating_word": summary(both_by_fold)},
        tfidf_ridge=figures(base, asked),
        tfidf_ridge_by_fold=summary(base_by_fold),
    )


def measure(
    learnt: Sequence[Conversation], asked: Sequence[Conversation], plan: Plan, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Trains both models, then scores `asked`: [n] on the scale, and facts about the training.

    With nothing asked, a tenth of the prompts is kept out of the training and judged instead.
    """
    held = deal(sorted({one.prompt for one in learnt}), round(1 / _VALIDATION_SHARE), seed)[0]
    train = list(learnt) if asked else [one for one in learnt if one.prompt not in held]
    validation = [one for one in learnt if one.prompt in held]
    model, lm_seconds = timed(
        lambda: agiqa_lm.train(texts(train), targets(train), train[0].wording, plan.lm, seed),
    )
    started = time.process_time()
    plain = torch.cat(model.states(texts(train)))
    mean, spread = plain.mean(0), plain.std(0)

    def capture(part: Sequence[Conversation], hidden: float = 0.0, draw: int = 0) -> list[Tensor]:
        return [((one - mean) / spread).half() for one in model.states(texts(part), hidden, draw)]

    readings = [one for draw in range(plan.readings) for one in capture(train, _HIDDEN, plan.readings * seed + draw)]
    judged = capture(validation)
    capture_seconds = round(time.process_time() - started, 1)
    optim = plan.head.optim.model_copy(update={"seed": seed})
    fitted, head_seconds = timed(
        lambda: fit(
            Examples(readings, targets(train).repeat(plan.readings)),
            Examples(judged, targets(validation)),
            plan.head.model_copy(update={"optim": optim}),
        )
    )
    # One pass over all readings, as the only epoch: `fit` has no other to choose.
    assert len(fitted.history) == 1
    facts: dict[str, Any] = {
        "lm_seconds": lm_seconds,
        "capture_seconds": capture_seconds,
        "head_seconds": head_seconds,
    }
    if not asked:
        scores, words = fitted.predictor.predict_all(judged).reshape(-1), model.rate(model.states(texts(validation)))
        facts["validation"] = figures(scores, validation)
        facts["validation_rating_word"] = figures(words, validation)
        facts["validation_with_rating_word"] = figures((scores + words) / 2, validation)
        facts["validation_tfidf_ridge"] = figures(tfidf_ridge(train, validation), validation)
        return torch.zeros(0), facts
    scores, words = fitted.predictor.predict_all(capture(asked)).reshape(-1), model.rate(model.states(texts(asked)))
    facts["rating_word"] = figures(words, asked)
    facts["with_rating_word"] = figures((scores + words) / 2, asked)
    return scores, facts


def tfidf_ridge(learnt: Sequence[Conversation], asked: Sequence[Conversation]) -> Tensor:
    """The baseline: [n] scores from the descriptions' words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    words = TfidfVectorizer(ngram_range=(1, 2))
    ridge = Ridge(alpha=1.0).fit(words.fit_transform([one.description for one in learnt]), targets(learnt).numpy())
    return torch.from_numpy(ridge.predict(words.transform([one.description for one in asked]))).float()


def read(folder: Path, *, own: bool = True) -> tuple[list[Conversation], list[Conversation]]:
    """The training and the test conversations.

    Args:
        own: whether the latter have the MLLM's own descriptions, or the teacher's as the former do.
    """
    with (folder / "data.csv").open(newline="", encoding="utf-8") as file:
        images = {row["name"]: (row["prompt"], float(row["mos_quality"])) for row in csv.DictReader(file)}

    def rows(name: str) -> list[Conversation]:
        found = []
        for one in json.loads((folder / name).read_text(encoding="utf-8")):
            image = PurePosixPath(one["image"]).name
            prompt, score = images[image]
            first, answer, second = (turn["content"] for turn in one["conversations"][:3])
            opening, inside, closing = first.removeprefix("<image>\n").partition(prompt)
            if not inside:
                raise ValueError(f"{name}: the question about {one['image']} lacks its prompt {prompt!r}")
            description = one["response_0"] if own and name.startswith("test") else answer
            found.append(Conversation(image, prompt, description, score, opening, closing, second))
        return found

    return rows("train_quality.json"), rows("test_quality_responses.json")


def deal(prompts: Sequence[str], parts: int, seed: int) -> list[set[str]]:
    """Prompts in so many parts of about equal size, at random."""
    mixed = random.Random(seed).sample(prompts, len(prompts))
    return [set(mixed[start::parts]) for start in range(parts)]


def texts(conversations: Iterable[Conversation]) -> list[str]:
    """What the language model reads."""
    return [one.text for one in conversations]


def targets(conversations: Iterable[Conversation]) -> Tensor:
    """The human scores, [n]."""
    return torch.tensor([one.score for one in conversations])


def figures(scores: Tensor, asked: Sequence[Conversation]) -> dict[str, float]:
    """How scores agree with the human ones."""
    if not asked:
        return {}
    found = agreement(scores, targets(asked))
    return {name: round(float(found[name] or 0), 4) for name in _FIGURES}  # type: ignore[literal-required]


def summary(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation of each figure."""
    together: dict[str, float] = {}
    for name in _FIGURES:
        values = [one[name] for one in found]
        together[name] = round(statistics.mean(values), 4)
        together[f"{name}_sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    return together


def timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """What it gives, and the CPU seconds that it took."""
    started = time.process_time()
    return work(), round(time.process_time() - started, 1)


def show(**line: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
