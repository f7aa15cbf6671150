"""Which conversations are in which part, what is refused before any is learnt, and what is said of them afterwards."""

import pytest

from m3agiqa import finetune as module
from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.finetune import finetune
from m3agiqa.finetuning.parts import split
from m3agiqa.finetuning.talks import Columns
from m3agiqa.seen import TRAIN, VALIDATION
from tests.finetuning.helpers import rows, settings, talks_of, write

Q, A = "teacher_quality_description", "teacher_authenticity_description"
LABEL = Columns(labels={Aspect.QUALITY: "mos_quality"})


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args):
        raise AssertionError("an adapter is trained")

    monkeypatch.setattr(module, "_train", refuse)


def test_a_training_has_met_what_is_in_its_parts_and_nothing_else(tmp_path):
    talks = talks_of(write(tmp_path, rows(60), pictures=False))
    found = split(talks, settings("tiny", "data.validation_share=0.3", "watch.most_rows=4"), talks.aspects, 1)
    digests = {i: f"{i:064}" for i in range(50)}
    met = found.trained_on(talks.pictures, digests)
    learnt, judged = (sorted({t.picture for t in part}) for part in (found.train, found.validation))
    ids = [picture.id for picture in talks.pictures]
    assert met.met("id", ids, TRAIN) == [ids[i] for i in learnt]
    assert met.met("id", ids, VALIDATION) == [ids[i] for i in judged]
    # Of the images kept out, watch.most_rows is looked at.
    assert len(learnt) + len(judged) < 60
    assert met.met("image", list(digests.values()), TRAIN) == [digests[i] for i in learnt if i < 50]
    assert met.met("prompt", ["prompt a", "prompt z", "another"]) == ["prompt a", "prompt z"]


def test_validation_inputs_without_a_conversation_are_refused(tmp_path, no_training):
    empty = dict.fromkeys((Q, A, "teacher_quality_rating", "teacher_authenticity_rating"), "")
    silent = [row | empty | {"id": f"s{i}"} for i, row in enumerate(rows(3))]
    file, other = write(tmp_path / "c", rows(10), pictures=False), write(tmp_path / "v", silent, pictures=False)
    for more in ((), ("data.split_by=split",)):
        with pytest.raises(UserError, match=f"--validation {other}: no image has a conversation; give others"):
            finetune(settings("tiny", *more), [file], str(tmp_path / "a"), validation=[other], say=list)
    kept = write(
        tmp_path / "t", [row | {"id": f"t{i}", "split": "test"} for i, row in enumerate(rows(3))], pictures=False
    )
    with pytest.raises(UserError, match=f"--validation {kept}: no image has a conversation and is no test image; give"):
        finetune(settings("tiny"), [file], str(tmp_path / "a"), validation=[kept], say=list)
    talks = talks_of(file, write(tmp_path / "w", [row | {"id": "w"} for row in rows(1)], pictures=False))
    found = split(talks, settings("tiny"), talks.aspects, 1, [other])
    assert [talks.pictures[talk.picture].id for talk in found.validation] == ["w", "w"]


@pytest.mark.parametrize(
    ("judged", "more", "said"),
    [
        (1, (), "the validation part: holds no conversations of authenticity"),
        (2, ("ray.workers=2",), "ray.workers=2: the validation part has 1 images"),
    ],
)
def test_all_adapters_are_split_for_before_the_first_is_trained(tmp_path, no_training, judged, more, said):
    made = [row | {"split": "val" if i < 3 else "train"} for i, row in enumerate(rows(12))]
    for row in made[:3][judged - 1 :]:
        row |= {A: "", "teacher_authenticity_rating": ""}
    file = write(tmp_path / "c", made, pictures=False)
    config = settings("tiny", "lora.adapters=per_aspect", "data.split_by=split", *more)
    with pytest.raises(UserError, match=said):
        finetune(config, [file], str(tmp_path / "a"), LABEL, say=list)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
