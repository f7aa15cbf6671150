"""AGIQA-3k's layout -> captured sets that `m3agiqa ablate` takes."""

import csv
import itertools
import json
import random
import sys

import pytest
import torch

from benchmarks import agiqa_sets
from m3agiqa.ablation.inputs import open_inputs
from m3agiqa.predictor.captured import open_captured

WORDS = {"sharp": 4.5, "clear": 3.5, "soft": 2.5, "blurred": 1.5, "broken": 0.5}
OPENING, CLOSING, SECOND = "Its prompt is: '", "'. Describe the quality.", "Now rate the quality of it with one word."


@pytest.fixture
def folder(tmp_path):
    """Conversations of 60 training and 20 test images, in the published files."""
    # Enough words that the vocabulary is larger than the language model is wide.
    others = ["".join(one) for one in itertools.product(["bar", "kel", "mos", "tin", "vul"], repeat=3)]
    draw, images, files = random.Random(0), [], {"train_quality.json": [], "test_quality_responses.json": []}
    for i in range(80):
        name, prompt, word = f"p_{i}.jpg", f"a small house number {i % 20}", draw.choice(sorted(WORDS))
        images.append({"name": name, "prompt": prompt, "mos_quality": WORDS[word] + draw.uniform(-0.4, 0.4)})
        said = f"The picture is {word} and it shows {' '.join(draw.sample(others, 12))}."
        talk = [f"<image>\n{OPENING}{prompt}{CLOSING}", said, SECOND, "good"]
        one = {"image": f"images/{name}", "conversations": [{"content": text} for text in talk]}
        if i < 60:
            files["train_quality.json"].append(one)
        else:
            files["test_quality_responses.json"].append(one | {"response_0": f"It looks {word}."})
    home = tmp_path / "agiqa"
    home.mkdir()
    with (home / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(images[0]))
        writer.writeheader()
        writer.writerows(images)
    for name, content in files.items():
        (home / name).write_text(json.dumps(content))
    return home


def test_the_sets_say_where_the_description_is(folder, tmp_path, monkeypatch):
    out = tmp_path / "sets"
    monkeypatch.setattr(sys, "argv", ["agiqa_sets", str(folder), "--out", str(out), "--epochs", "1"])
    agiqa_sets.main()
    uris = {name: str(out / name) for name in ("teacher", "own")}
    sets = open_inputs(uris, ("quality", "mos_quality"), (0.0, 5.0), tmp_path / "states")
    teacher, own = sets["teacher"], sets["own"]
    assert (len(teacher.ids), len(own.ids)) == (80, 20)
    assert set(teacher.splits) == {"train", "val", "test"}
    assert {name for name, split in zip(teacher.ids, teacher.splits, strict=True) if split == "test"} == set(own.ids)
    assert open_captured(uris["own"]).states_of == open_captured(uris["teacher"]).states_of
    for one in sets.values():
        assert one.bounds is not None
        assert bool((one.bounds[:, 0] < one.bounds[:, 1]).all())
        assert bool((one.bounds[:, 1] < one.conversations.tokens).all())
    # Before the description both sets read the same of an image, so a causal model has the same states.
    first, second = (one.shown("none", "states") for one in (teacher, own))
    for i, name in enumerate(own.ids):
        assert torch.allclose(second[i].float(), first[teacher.ids.index(name)].float(), atol=0.02)
    longer = teacher.shown("description", "states")[teacher.ids.index(own.ids[0])]
    assert len(longer) > len(own.shown("description", "states")[0])
