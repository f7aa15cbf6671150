"""Which conversations are trained on and which judge, and which worker has them.

All conversations of an image are in one part and with one worker. By default all images of a prompt are in one
part, too: an adapter that has seen a validation prompt in training looks better than it is. What the column `split`
marks as test is in no part, however the others are split.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.talks import Picture, Talk, Talks
from m3agiqa.predictor.splits import TEST, check_validation, hold_out, part_of_name, test_notes
from m3agiqa.seen import TRAIN, VALIDATION, Seen, seen, union

PARTS = ("train", "val")


@dataclass(frozen=True)
class Share:
    """What one worker has.

    Attributes:
        pictures: by the numbers that `Talk.picture` means, of both parts.
    """

    pictures: dict[int, Picture]
    train: list[Talk]
    validation: list[Talk]


@dataclass(frozen=True)
class Split:
    """Conversations of both parts.

    Attributes:
        notes: what a reader of the results should know.
    """

    train: list[Talk]
    validation: list[Talk]
    notes: tuple[str, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """Part -> images, and conversations by aspect."""
        found = {}
        for name, talks in (("train", self.train), ("validation", self.validation)):
            by_aspect = Counter(str(talk.aspect) for talk in talks)
            found[name] = {"images": len({talk.picture for talk in talks}), **dict(sorted(by_aspect.items()))}
        return found

    def trained_on(self, pictures: Sequence[Picture], digests: Mapping[int, str]) -> Seen | None:
        """What a training on it has met, part by part; an image that is in neither part it has not.

        Args:
            digests: SHA-256 of the image files, by the pictures' numbers, as far as they are known.
        """
        found = []
        for part, talks in ((TRAIN, self.train), (VALIDATION, self.validation)):
            numbers = sorted({talk.picture for talk in talks})
            rows = [pictures[i] for i in numbers]
            ids, prompts = [row.id for row in rows], [row.prompt for row in rows]
            found.append(seen(ids, [digests.get(i) for i in numbers], prompts, part))
        return union(found)

    def digest(self, pictures: Sequence[Picture]) -> str:
        """Of which conversation is in which part."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for talk in part:
                values = (pictures[talk.picture].id, talk.aspect, talk.prompt, talk.description, talk.word, talk.score)
                digest.update(repr(values).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]


def split(
    talks: Talks,
    config: FinetuneConfig,
    aspects: Sequence[Aspect],
    training_inputs: int,
    validation: Sequence[str] = (),
) -> Split:
    """Splits as `config.data` says; decided by the seed and the ids alone.

    Args:
        aspects: the others are left out.
        training_inputs: the first so many inputs are for training, the others for validation only.
        validation: the URIs of those others.

    Raises:
        UserError: for a part that comes out empty, and unknown values of `split`.
    """
    pictures = talks.pictures
    origins, tests = [p.origin for p in pictures], [part_of_name(p.split) == TEST for p in pictures]
    check_validation(validation, origins, tests, training_inputs, "conversation")
    given = ["train" if origin < training_inputs else "val" for origin in origins]
    part_of = [TEST if is_test else part for part, is_test in zip(given, tests, strict=True)]
    if config.data.split_by == "split":
        part_of = _by_column(pictures, part_of, training_inputs)
    elif "val" not in part_of:
        by_prompt = config.data.split_by == "prompt"
        groups = [f"prompt {p.prompt}" if by_prompt and p.prompt is not None else f"id {p.id}" for p in pictures]
        rng = np.random.default_rng(config.optim.seed)
        left = [i for i, part in enumerate(part_of) if part == "train"]
        for i in hold_out(left, groups, config.data.validation_share * len(left), rng):
            part_of[i] = "val"
    mine = [talk for talk in talks.talks if talk.aspect in aspects]
    train, judged = ([talk for talk in mine if part_of[talk.picture] == part] for part in PARTS)
    for name, part in (("training", train), ("validation", judged)):
        if not part:
            cure = "give more images, or another share; data.split_by=id splits within a prompt"
            kept = f" beside {sum(tests)} test images" if any(tests) else ""
            raise UserError(f"the {name} part", f"holds no conversations of {', '.join(aspects)}{kept}", cure)
    return Split(train, _spread(judged, config.watch.most_rows), _notes(pictures, part_of))


def _by_column(pictures: Sequence[Picture], part_of: list[str], training_inputs: int) -> list[str]:
    named = [part_of_name(picture.split) for picture in pictures]
    if None in named:
        picture = pictures[named.index(None)]
        rule = f"{picture.row} has the value {picture.split} in the column split"
        raise UserError("data.split_by=split", rule, "write train, val or test there, or split by prompt")
    if any(picture.origin >= training_inputs for picture in pictures):
        return [part if name == "train" else str(name) for name, part in zip(named, part_of, strict=True)]
    return [str(name) for name in named]


def _spread(talks: list[Talk], most: int) -> list[Talk]:
    """At most so many, evenly spread."""
    return talks if len(talks) <= most else [talks[i * len(talks) // most] for i in range(most)]


def _notes(pictures: Sequence[Picture], part_of: Sequence[str]) -> tuple[str, ...]:
    prompts: dict[str, set[str]] = {part: set() for part in ("train", "val", "test")}
    for picture, part in zip(pictures, part_of, strict=True):
        if picture.prompt is not None:
            prompts[part].add(picture.prompt)
    notes = []
    if shared := len(prompts["val"] & prompts["train"]):
        notes.append(f"{shared} of {len(prompts['val'])} validation prompts are also trained on: figures flatter")
    return (*notes, *test_notes(part_of, prompts))


def shares(found: Split, pictures: Sequence[Picture], workers: int) -> list[Share]:
    """What each worker has: images in turn, with all of their conversations.

    Raises:
        UserError: if there is not an image of each part for every worker.
    """
    made = [Share({}, [], []) for _ in range(workers)]
    for talks, part in ((found.train, "train"), (found.validation, "validation")):
        order = {number: i for i, number in enumerate(dict.fromkeys(talk.picture for talk in talks))}
        if len(order) < workers:
            rule = f"the {part} part has {len(order)} images"
            raise UserError(f"ray.workers={workers}", rule, "ask for fewer workers, or give more images")
        for talk in talks:
            share = made[order[talk.picture] % workers]
            share.pictures[talk.picture] = pictures[talk.picture]
            getattr(share, part).append(talk)
    return made
