"""Which conversations are trained on, which choose the best epoch, and which calibrate the intervals.

All aspects of an image are in one part. By default all images of a prompt are, too: a predictor that has seen
a validation prompt in training looks better than it is. What the column `split` marks as test is in no part, however
the others are split: whoever wrote it there means to measure on it.

Intervals are calibrated on images that no adapter was trained on, where they are enough: the states of the others
tell more of their score than those of new images do, and intervals from them hold less often than they say.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import CapturedSet, Conversations, Ints
from m3agiqa.seen import TRAIN, union
from m3agiqa.train_config import TrainConfig

_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TEST = "test"
"""The part that no training touches."""


@dataclass(frozen=True)
class Parts:
    """Conversations of each part, by their places; none is in two.

    Attributes:
        calibration: empty where no intervals are wanted.
        notes: what a reader of the results should know, in words.
    """

    train: Ints
    validation: Ints
    calibration: Ints
    notes: tuple[str, ...]

    def counts(self, conversations: Conversations, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """Part -> images, and conversations by the name of their output."""
        found = {}
        for part, keys in (("train", self.train), ("validation", self.validation), ("calibration", self.calibration)):
            by_output = np.bincount(conversations.output[keys], minlength=len(names)).tolist()
            images = len(np.unique(conversations.image[keys]))
            found[part] = {"images": images, **dict(zip(names, by_output, strict=True))}
        return found


def split(conversations: Conversations, config: TrainConfig, names: Sequence[str], training_sets: int) -> Parts:
    """Splits as `config.data` and `config.calibration` say; decided by the seed and the ids alone.

    Args:
        names: of the outputs.
        training_sets: the first so many captured sets are for training, the others for validation only.

    Raises:
        UserError: for a part that comes out empty or too small for its use, and unknown values of `split`.
    """
    given = [one.uri for one in conversations.sets[training_sets:]]
    tests = [part_of_name(one) == TEST for one in conversations.splits]
    check_validation(given, conversations.origin, tests, training_sets, f"label of {', '.join(names)} with states")
    rng = np.random.default_rng(config.optim.seed)
    part_of = _given(conversations, tests, config, training_sets)
    groups = _groups(conversations, by_prompt=config.data.split_by != "id")
    images = [i for i, part in enumerate(part_of) if part == "train"]
    if "val" not in part_of:
        for i in hold_out(images, groups, config.data.validation_share * len(images), rng):
            part_of[i] = "val"
    images = [i for i in images if part_of[i] == "train"]
    taught = _taught(conversations)
    held: list[int] = []
    if config.calibration.share:
        free = _free(conversations, images, groups, taught, config.calibration.level)
        held = hold_out(free or images, groups, config.calibration.share * len(images), rng)
    for i in held:
        part_of[i] = "calibration"
    of_conversation = np.array(part_of)[conversations.image]
    train, validation, calibration = (np.flatnonzero(of_conversation == p) for p in ("train", "val", "calibration"))
    notes = (*_answer_notes(conversations.sets, training_sets), *_notes(conversations, part_of))
    parts = Parts(train, validation, calibration, (*notes, *_interval_notes(held, taught)))
    _check(conversations, parts, config, names)
    return parts


def check_validation(
    given: Sequence[str], origins: Iterable[int], tests: Iterable[bool], training: int, what: str
) -> None:
    """Refuses validation inputs of which nothing can be used: a share of the training would judge in their place.

    Args:
        given: their URIs. origins: number of the input of each image that has a `what`. tests: which are for tests.
        training: the first so many inputs are for training.
    """
    judging = [is_test for origin, is_test in zip(origins, tests, strict=True) if origin >= training]
    if given and all(judging):
        what += " and is no test image" if judging else ""
        cure = "give others, or leave it out: a share of the training images (data.validation_share) judges then"
        raise UserError(f"--validation {', '.join(given)}", f"no image has a {what}", cure)


def _taught(conversations: Conversations) -> set[int]:
    """The images that an adapter of the captured sets was trained on, as far as that is known."""
    met = union(one.met for one in conversations.sets)
    if met is None:
        return set()
    digests, ids = (set(met.met(k, v, TRAIN)) for k, v in (("image", conversations.digests), ("id", conversations.ids)))
    pairs = zip(conversations.ids, conversations.digests, strict=True)
    return {i for i, (one, digest) in enumerate(pairs) if one in ids or digest in digests}


def _free(
    conversations: Conversations, images: Sequence[int], groups: Sequence[str], taught: set[int], level: float
) -> list[int]:
    """The images to calibrate on: those of groups without a taught image; none, if they are too few for the level."""
    mixed = {groups[i] for i in images if i in taught}
    free = [i for i in images if groups[i] not in mixed]
    outputs = int(conversations.output.max()) + 1
    labels = np.bincount(conversations.output[np.isin(conversations.image, free)], minlength=outputs)
    return free if labels.min() >= labels_needed(level) else []


def _interval_notes(held: Sequence[int], taught: set[int]) -> list[str]:
    """What the adapters' training means for the intervals; nothing where it has met none of the images."""
    if not held or not taught:
        return []
    if not (both := len(taught.intersection(held))):
        return [f"intervals are calibrated on {len(held)} images that no adapter was trained on"]
    return [
        f"an adapter was trained on {both} of the {len(held)} calibration images, so that intervals may be too narrow: "
        "capture labelled images that it was not trained on as well, or raise finetune's data.validation_share"
    ]


def _answer_notes(sets: Sequence[CapturedSet], training_sets: int) -> list[str]:
    """What whose descriptions the states are of means for the scores."""
    of = {kind: [one.uri for one in sets if one.first_answer == kind] for kind in ("own", "given")}
    notes = []
    if all(of.values()):
        notes.append(
            f"descriptions are the model's own in {', '.join(of['own'])}, and given in {', '.join(of['given'])}"
        )
    if any(one.first_answer == "given" for one in sets[:training_sets]):
        notes.append(
            "it is trained on states of given descriptions, but in use it sees the model's own: figures and intervals "
            "from given ones may flatter"
        )
    return notes


def labels_needed(level: float) -> int:
    """The fewest held-out labels that give an interval at a level (see `calibrate`)."""
    exact = Fraction(str(level))
    return math.ceil(exact / (1 - exact))


def _given(conversations: Conversations, tests: Sequence[bool], config: TrainConfig, training_sets: int) -> list[str]:
    """The part of each image before anything is held out."""
    origins = zip(conversations.origin, tests, strict=True)
    part_of = [TEST if is_test else "train" if origin < training_sets else "val" for origin, is_test in origins]
    if config.data.split_by != "split":
        return part_of
    unknown = Counter(str(one) for one in conversations.splits if part_of_name(one) is None)
    if unknown:
        value, count = unknown.most_common(1)[0]
        rule = f"{count} images have the value {value} in the column split"
        raise UserError("data.split_by=split", rule, "write train, val or test there, or split by prompt")
    named = [str(part_of_name(one)) for one in conversations.splits]
    if len(conversations.sets) > training_sets:
        # A validation set of its own is validation whatever its column says, but for what is kept for tests.
        return [part if name == "train" else name for name, part in zip(named, part_of, strict=True)]
    if "val" not in named:
        raise UserError("data.split_by=split", "no image is of the part val", "mark some, or split by prompt")
    return named


def _groups(conversations: Conversations, *, by_prompt: bool) -> list[str]:
    """What each image is kept together with; an image without a prompt is alone."""
    pairs = zip(conversations.prompts, conversations.ids, strict=True)
    return [f"prompt {prompt}" if by_prompt and prompt is not None else f"id {one}" for prompt, one in pairs]


def part_of_name(value: str | None) -> str | None:
    """`train`, `val` or `test` of what a column `split` holds, in whatever case; None for anything else."""
    return _NAMES.get(str(value).strip().lower())


def hold_out(images: Sequence[int], groups: Sequence[str], wanted: float, rng: np.random.Generator) -> list[int]:
    """Whole groups at random until they hold so many images."""
    members: dict[str, list[int]] = {}
    for i in images:
        members.setdefault(groups[i], []).append(i)
    names = sorted(members)
    held: list[int] = []
    for place in rng.permutation(len(names)).tolist():
        if len(held) >= wanted:
            break
        held += members[names[place]]
    return held


def _notes(conversations: Conversations, part_of: Sequence[str]) -> tuple[str, ...]:
    prompts: dict[str, set[str]] = {part: set() for part in ("train", "val", "calibration", "test")}
    for part, prompt in zip(part_of, conversations.prompts, strict=True):
        if prompt is not None:
            prompts[part].add(prompt)
    notes = []
    if shared := len(prompts["val"] & prompts["train"]):
        notes.append(f"{shared} of {len(prompts['val'])} validation prompts are also trained on: scores flatter")
    return (*notes, *test_notes(part_of, prompts))


def test_notes(part_of: Sequence[str], prompts: Mapping[str, set[str]]) -> list[str]:
    """What is said of the images that are kept for tests.

    Args:
        part_of: the part of each image. prompts: those of each part.
    """
    notes = []
    if tests := part_of.count(TEST):
        notes.append(f"{tests} test images are not touched")
    if shared := len(prompts[TEST] & prompts["train"]):
        notes.append(f"{shared} of {len(prompts[TEST])} test prompts are also trained on: scores on them flatter")
    return notes


def _check(conversations: Conversations, parts: Parts, config: TrainConfig, names: Sequence[str]) -> None:
    wide = "give more images, or other shares; data.split_by=id splits within a prompt"
    tests = sum(part_of_name(one) == TEST for one in conversations.splits)
    kept = f" beside {tests} test images" if tests else ""
    for i, name in enumerate(names):
        for part, keys in (("training", parts.train), ("validation", parts.validation)):
            labels = conversations.label[keys][conversations.output[keys] == i]
            if not len(labels):
                raise UserError(f"the {part} part", f"holds no labels of {name}{kept}", wide)
            if labels.min() == labels.max():
                raise UserError(f"the {part} part", f"its {len(labels)} labels of {name} are all {labels[0]:g}", wide)
        level, held = config.calibration.level, int((conversations.output[parts.calibration] == i).sum())
        if config.calibration.share and held < labels_needed(level):
            raise UserError(
                f"calibration.share={config.calibration.share:g}",
                f"{held} held-out labels of {name} are too few for intervals at level {level:g}, "
                f"which need {labels_needed(level)}",
                "raise it, lower calibration.level, or set calibration.share=0 for no intervals",
            )
