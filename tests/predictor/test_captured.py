"""Captured sets as training reads them: their conversations, the parts these are split into, and their states."""

from pathlib import Path

import numpy as np
import pytest

from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import chunks, first_answers, open_captured, read_chunk, read_conversations
from m3agiqa.predictor.splits import split
from m3agiqa.seen import FILE, VALIDATION, seen, union
from m3agiqa.settings import load
from m3agiqa.train_config import TrainConfig
from tests.captured_sets import SMALL, rows, write

QUALITY = {"quality": "mos_quality"}


def plan(folder, *more, labels=QUALITY):
    conversations = read_conversations([open_captured(folder)], labels, (0.0, 5.0))
    return conversations, split(conversations, load(TrainConfig, None, [*SMALL, *more]), tuple(labels), 1)


def test_no_prompt_and_no_image_is_in_two_parts(tmp_path):
    folder = write(tmp_path / "set", rows(200, aspects=("quality", "correspondence"), prompts=50))
    labels = {"correspondence": "mos_correspondence", "quality": "mos_quality"}
    conversations, parts = plan(folder, labels=labels)
    prompts = [
        {conversations.prompts[conversations.image[key]] for key in keys}
        for keys in (parts.train, parts.validation, parts.calibration)
    ]
    assert sum(map(len, prompts)) == 50 == len(set.union(*prompts))
    assert parts.counts(conversations, tuple(labels))["validation"] == {
        "images": 20, "correspondence": 20, "quality": 20,
    }  # fmt: skip
    again = plan(folder, labels=labels)[1]
    assert again.train.tolist() == parts.train.tolist()
    assert plan(folder, "optim.seed=1", labels=labels)[1].train.tolist() != parts.train.tolist()


def ids_of(conversations, keys):
    return {conversations.ids[i] for i in conversations.image[keys].tolist()}


def taught(folder, ids, images=(), validation=()):
    """A captured set whose adapter was trained on some of its images."""
    union([seen(ids, images, []), seen(validation, [], [], VALIDATION)]).write(Path(folder, FILE))
    return folder


def test_intervals_are_calibrated_on_images_that_no_adapter_was_trained_on(tmp_path):
    made = rows(200, prompts=100)
    for i, row in enumerate(made):
        row["image_sha256"] = f"{i:064x}"
    before, plain = plan(write(tmp_path / "plain", made))
    # Of 60 prompts by id, of 10 by the image alone; the other 30, of which one was in both parts, are like new ones.
    ids = [row["id"] for i, row in enumerate(made) if i % 100 < 60]
    images = [row["image_sha256"] for i, row in enumerate(made) if 60 <= i % 100 < 70]
    held = [row["id"] for i, row in enumerate(made) if i % 100 >= 70]
    folder = taught(write(tmp_path / "set", made), ids, images, held)
    conversations, parts = plan(folder)
    assert parts.validation.tolist() == plain.validation.tolist()
    calibrated = ids_of(conversations, parts.calibration)
    assert len(calibrated) == len(plain.calibration) == 18
    assert calibrated <= set(held)
    assert parts.notes == ("intervals are calibrated on 18 images that no adapter was trained on",)
    assert not ids_of(before, plain.calibration) <= set(held)
    # Fewer than asked for, but enough for the level.
    few = plan(taught(folder, [row["id"] for i, row in enumerate(made) if i % 100 >= 6]))
    assert 4 <= len(few[1].calibration) <= 12
    assert "that no adapter was trained on" in few[1].notes[0]


def test_without_images_like_new_ones_intervals_are_calibrated_as_ever_and_a_note_says_so(tmp_path):
    made = rows(200, prompts=100)
    plain = plan(write(tmp_path / "plain", made))[1]
    for name, ids, count in (("all", [row["id"] for row in made], 18), ("unmet", ["other"], 0)):
        parts = plan(taught(write(tmp_path / name, made), ids))[1]
        assert [parts.train.tolist(), parts.calibration.tolist()] == [plain.train.tolist(), plain.calibration.tolist()]
        said = f"an adapter was trained on {count} of the 18 calibration images, so that intervals may be too narrow"
        assert [note.startswith(said) for note in parts.notes] == ([True] if count else [])
    # Images of a prompt that was trained on are kept together with those that were.
    mixed = plan(taught(write(tmp_path / "mixed", made), [row["id"] for row in made[:100]]))[1]
    assert "intervals may be too narrow" in mixed.notes[0]
    assert not plan(str(tmp_path / "mixed"), "calibration.share=0")[1].notes


def test_the_column_split_is_kept_to_and_tests_are_not_touched(tmp_path):
    made = rows(90)
    for i, row in enumerate(made):
        row["split"] = ("train", "train", "val", "test")[i % 4]
    conversations, parts = plan(write(tmp_path / "set", made), "data.split_by=split")
    for part, keys in (("val", parts.validation), ("train", parts.train), ("train", parts.calibration)):
        assert {conversations.splits[conversations.image[key]] for key in keys} == {part}
    assert parts.notes == ("22 test images are not touched",)
    assert len(parts.train) + len(parts.validation) + len(parts.calibration) == 68


@pytest.mark.parametrize("split_by", ["prompt", "id"])
def test_tests_are_not_touched_however_the_others_are_split(tmp_path, split_by):
    made = rows(90, prompts=30)
    for i, row in enumerate(made):
        row["split"] = ("train", "Test", None, "fold 3")[i % 4]
    conversations, parts = plan(write(tmp_path / "set", made), f"data.split_by={split_by}")
    taken = np.concatenate([parts.train, parts.validation, parts.calibration])
    assert "Test" not in {conversations.splits[conversations.image[key]] for key in taken}
    # All others, with no part but the tests' decided by the column.
    assert len(taken) == len(set(taken)) == 90 - 23
    assert 6 <= len(parts.validation) <= 9
    assert "23 test images are not touched" in parts.notes
    assert any(note.endswith("test prompts are also trained on: scores on them flatter") for note in parts.notes)


def test_a_validation_set_does_not_judge_by_its_test_images(tmp_path):
    sets = [rows(60), rows(30, 1, prefix="v")]
    for i, row in enumerate(sets[1]):
        row["split"] = "test" if i % 3 else "train"
    sets[0] = [row | {"split": None} for row in sets[0]]
    folders = [write(tmp_path / name, made) for name, made in zip("ab", sets, strict=True)]
    config = load(TrainConfig, None, SMALL)

    def parts_of(*names):
        conversations = read_conversations([open_captured(name) for name in names], QUALITY, (0.0, 5.0))
        return conversations, split(conversations, config, ("quality",), 1)

    conversations, parts = parts_of(*folders)
    assert ids_of(conversations, parts.validation) == {row["id"] for row in sets[1][::3]}
    assert "20 test images are not touched" in parts.notes
    only = write(tmp_path / "c", [row | {"split": "test"} for row in sets[1]])
    with pytest.raises(UserError, match=r"--validation .*no image has a label of quality with states and is no test"):
        parts_of(folders[0], only)
    with pytest.raises(UserError, match=r"the training part: holds no labels of quality beside 30 test images"):
        parts_of(only)


@pytest.mark.parametrize(
    ("kinds", "said", "notes"),
    [
        (["own"], "own", []),
        ([None], "unknown", []),
        (["own", "own"], "own", []),
        (["given"], "given", ["given"]),
        (["own", "given"], "own", ["mixed"]),
        (["given", "own"], "given", ["mixed", "given"]),
    ],
)
def test_whose_descriptions_the_states_are_of_is_told(tmp_path, kinds, said, notes):
    """The first set is trained on, the second judges."""
    given = [{} if kind is None else {"first_answer": kind} for kind in kinds]
    folders = [write(tmp_path / f"{i}", rows(40, i, prefix=f"{i}"), **more) for i, more in enumerate(given)]
    sets = [open_captured(folder) for folder in folders]
    conversations = read_conversations(sets, QUALITY, (0.0, 5.0))
    found = split(conversations, load(TrainConfig, None, SMALL), ("quality",), 1).notes
    assert first_answers(sets[:1]) == said
    wordings = {
        "given": "it is trained on states of given descriptions, but in use it sees the model's own",
        "mixed": "descriptions are the model's own in {own}, and given in {given}",
    }
    by_kind = dict(zip(kinds, folders, strict=True))
    expected = [wordings[note].format(**by_kind) if note == "mixed" else wordings[note] for note in notes]
    assert len(found) == len(expected)
    assert all(note.startswith(start) for note, start in zip(found, expected, strict=True))


def test_what_has_no_label_or_no_states_is_left_out_and_counted(tmp_path):
    made = rows(60)
    made[0]["mos_quality"] = None
    made[1] |= {"quality_states": None, "quality_tokens": None}
    made[2]["status"] = "failed"
    conversations, _ = plan(write(tmp_path / "set", made))
    assert len(conversations.label) == 57
    assert set(conversations.notes) == {
        "1 rows that are not ok left out",
        "1 images without mos_quality left out",
        "1 images with mos_quality but no states of quality left out",
    }


def test_chunks_give_every_conversation_its_own_states(tmp_path):
    aspects = ("quality", "correspondence")
    made = rows(100, aspects=aspects)
    conversations, parts = plan(
        write(tmp_path / "set", made, group=45), labels={aspect: f"mos_{aspect}" for aspect in aspects}
    )
    by_id = {row["id"]: row for row in made}
    for most in (1000, 7):
        found = chunks(conversations, aspects, parts.train, most)
        seen = []
        for chunk in found:
            tables = list(read_chunk(chunk))
            keys = [key for table in tables for key in table["key"].to_pylist()]
            assert keys == list(chunk.keys)
            assert sum(sum(table["tokens"].to_pylist()) for table in tables) == chunk.tokens
            seen += keys
            for table in tables:
                for key, states in zip(table["key"].to_pylist(), table["states"].to_pylist(), strict=True):
                    place = parts.train[key]
                    row = by_id[conversations.ids[conversations.image[place]]]
                    assert row[f"{aspects[conversations.output[place]]}_states"] == states
        assert sorted(seen) == list(range(len(parts.train)))
