"""Who is trained on, who chooses the epoch, and who is tested on: the same for all inputs and all variations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.data import Input
from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import LEAST_LABELS, Ints
from m3agiqa.predictor.splits import hold_out, part_of_name

# The name of its input, or nothing where an id means the same image in all, and its id.
_Image = tuple[str, str]


@dataclass(frozen=True)
class Parts:
    """The part of every image of every input.

    Attributes:
        of: name of an input -> id -> `train`, `val` or `test`. notes: what a reader of the results should know.
    """

    of: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]

    def holds(self, one: Input, part: str) -> set[str]:
        """Ids of a part in an input."""
        return {name for name, own in self.of[one.name].items() if own == part}

    def places(self, one: Input, part: str, among: set[str] | None = None) -> Ints:
        """Conversations of a part, sorted by id: the same order in inputs that hold the same images.

        Args:
            among: ids that may be taken; None: all.
        """
        ids, held = one.ids, self.holds(one, part)
        own = [i for i, name in enumerate(ids) if name in held and (among is None or name in among)]
        return np.array(sorted(own, key=lambda i: ids[i]), dtype=np.int64)


def assign(inputs: Sequence[Input], config: AblateConfig, *, same_images: bool) -> Parts:
    """Splits all images together, as `data` and `measure` say: a prompt, or an id, is in the same part in all inputs.

    Args:
        same_images: an id means the same image in all inputs. If not, each has images of its own, and an id that two
            have says nothing but that they stay together where there is no prompt, or the split is by id.

    Raises:
        UserError: for a column `split` that is not what it should be, and inputs that say different things of an image.
    """
    prompts = _by_image(inputs, "prompt", same_images)
    images = sorted(prompts)
    by_prompt = config.data.split_by != "id"
    groups = [f"prompt {prompts[i]}" if by_prompt and prompts[i] is not None else f"id {i[1]}" for i in images]
    rng = np.random.default_rng(config.measure.split_seed)
    if config.data.split_by == "split":
        splits = _by_image(inputs, "split", same_images)
        part_of = _given([splits[i] for i in images])
    else:
        part_of = ["train"] * len(images)
        for i in hold_out(range(len(images)), groups, config.measure.test_share * len(images), rng):
            part_of[i] = "test"
    if "val" not in part_of:
        left = [i for i, part in enumerate(part_of) if part == "train"]
        for i in hold_out(left, groups, config.data.validation_share * len(left), rng):
            part_of[i] = "val"
    found = dict(zip(images, part_of, strict=True))
    of = {one.name: {name: found[_image(one, name, same_images)] for name in one.ids} for one in inputs}
    return Parts(of, _notes(found, prompts))


def common_ids(inputs: Sequence[Input], parts: Parts, wanted: Sequence[str], said: str) -> set[str]:
    """Ids of some parts that all inputs hold: what may be compared.

    Raises:
        UserError: if they are too few, or their labels all equal.
    """
    common: set[str] = set()
    for part in wanted:
        own = set.intersection(*(parts.holds(one, part) for one in inputs))
        common |= own
        count = len(own)
        if count < LEAST_LABELS:
            names = ", ".join(one.name for one in inputs)
            rule = f"{count} images of the {part} part have states and a label in all of {names}"
            raise UserError(said, rule, f"give at least {LEAST_LABELS}")
        for one in inputs:
            labels = one.labels[parts.places(one, part, own)]
            if bool((labels == labels[0]).all()):
                rule = f"all {count} labels of the {part} part are {labels[0]:g}"
                raise UserError(f"--input {one.name}", rule, "give labels that differ, or other parts")
    return common


def _image(one: Input, name: str, same_images: bool) -> _Image:
    return ("" if same_images else one.name, name)


def _by_image(inputs: Sequence[Input], what: Literal["prompt", "split"], same_images: bool) -> dict[_Image, str | None]:
    """The prompt, or what the column `split` holds, of every image; of several inputs, from the first that says it.

    Raises:
        UserError: for an image of which two inputs say different things.
    """
    found: dict[_Image, str | None] = {}
    for one in inputs:
        for name, value in zip(one.ids, one.prompts if what == "prompt" else one.splits, strict=True):
            image = _image(one, name, same_images)
            known = found.get(image)
            if known is not None and value is not None and known != value:
                raise UserError(
                    f"--input {one.name}",
                    f"the id {name} has another {what} there than in an input before it ({value!r}, not {known!r})",
                    "give inputs of the same images with the same ids; those of other images are for cross-evaluate",
                )
            found[image] = value if known is None else known
    return found


def _given(splits: Sequence[str | None]) -> list[str]:
    found = [part_of_name(one) for one in splits]
    unknown = sorted({str(one) for one, part in zip(splits, found, strict=True) if part is None})
    if unknown:
        rule = f"the column split holds {', '.join(unknown[:3])}"
        raise UserError("data.split_by=split", rule, "write train, val or test there, or split by prompt")
    known = [part for part in found if part is not None]
    if "test" not in known:
        raise UserError("data.split_by=split", "no image is of the part test", "mark some, or split by prompt")
    return known


def _notes(part_of: Mapping[_Image, str], prompts: Mapping[_Image, str | None]) -> tuple[str, ...]:
    seen: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for image, part in part_of.items():
        if (prompt := prompts[image]) is not None:
            seen[part].add(prompt)
    shared = len(seen["test"] & seen["train"])
    if not shared:
        return ()
    return (f"{shared} of {len(seen['test'])} test prompts are also trained on: scores flatter",)
