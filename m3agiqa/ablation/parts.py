"""Who is trained on, who chooses the epoch, and who is tested on: the same for all inputs and all variations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.data import Input
from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import LEAST_LABELS, Ints
from m3agiqa.predictor.splits import hold_out, part_of_name


@dataclass(frozen=True)
class Parts:
    """The part of every image, by its id.

    Attributes:
        of: id -> `train`, `val` or `test`. notes: what a reader of the results should know.
    """

    of: Mapping[str, str]
    notes: tuple[str, ...]

    def places(self, one: Input, part: str, among: set[str] | None = None) -> Ints:
        """Conversations of a part, sorted by id: the same order in inputs that hold the same images.

        Args:
            among: ids that may be taken; None: all.
        """
        ids = one.ids
        own = [i for i, name in enumerate(ids) if self.of[name] == part and (among is None or name in among)]
        return np.array(sorted(own, key=lambda i: ids[i]), dtype=np.int64)


def assign(inputs: Sequence[Input], config: AblateConfig) -> Parts:
    """Splits all images together, as `data` and `measure` say: an image or a prompt is in the same part in all inputs.

    Raises:
        UserError: for a column `split` that is not what it should be.
    """
    prompts: dict[str, str | None] = {}
    splits: dict[str, str | None] = {}
    for one in inputs:
        for name, prompt, split in zip(one.ids, one.prompts, one.splits, strict=True):
            prompts.setdefault(name, prompt)
            splits.setdefault(name, split)
    ids = sorted(prompts)
    by_prompt = config.data.split_by != "id"
    groups = [f"prompt {prompts[i]}" if by_prompt and prompts[i] is not None else f"id {i}" for i in ids]
    rng = np.random.default_rng(config.measure.split_seed)
    if config.data.split_by == "split":
        part_of = _given([splits[i] for i in ids])
    else:
        part_of = ["train"] * len(ids)
        for i in hold_out(range(len(ids)), groups, config.measure.test_share * len(ids), rng):
            part_of[i] = "test"
    if "val" not in part_of:
        left = [i for i, part in enumerate(part_of) if part == "train"]
        for i in hold_out(left, groups, config.data.validation_share * len(left), rng):
            part_of[i] = "val"
    return Parts(dict(zip(ids, part_of, strict=True)), _notes(ids, part_of, prompts))


def common_ids(inputs: Sequence[Input], parts: Parts, wanted: Sequence[str], said: str) -> set[str]:
    """Ids of some parts that all inputs hold: what may be compared.

    Raises:
        UserError: if they are too few, or their labels all equal.
    """
    held = [{i for i in one.ids if parts.of[i] in wanted} for one in inputs]
    common = set.intersection(*held)
    for part in wanted:
        count = sum(parts.of[i] == part for i in common)
        if count < LEAST_LABELS:
            names = ", ".join(one.name for one in inputs)
            rule = f"{count} images of the {part} part have states and a label in all of {names}"
            raise UserError(said, rule, f"give at least {LEAST_LABELS}")
        for one in inputs:
            labels = one.labels[parts.places(one, part, common)]
            if bool((labels == labels[0]).all()):
                rule = f"all {count} labels of the {part} part are {labels[0]:g}"
                raise UserError(f"--input {one.name}", rule, "give labels that differ, or other parts")
    return common


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


def _notes(ids: Sequence[str], part_of: Sequence[str], prompts: Mapping[str, str | None]) -> tuple[str, ...]:
    seen: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for name, part in zip(ids, part_of, strict=True):
        if (prompt := prompts[name]) is not None:
            seen[part].add(prompt)
    shared = len(seen["test"] & seen["train"])
    if not shared:
        return ()
    return (f"{shared} of {len(seen['test'])} test prompts are also trained on: scores flatter",)
