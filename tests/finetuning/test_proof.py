"""The proof of a finished adapter, and the card that goes with it."""

import importlib.util
import json
from pathlib import Path

import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.finetuning.card import SHEET, write_card, write_sheet
from m3agiqa.finetuning.figures import Judged, figures
from m3agiqa.finetuning.proof import exam, proof_lines, prove, run_config
from tests.adapters.adapter_helpers import write_adapter
from tests.finetuning.helpers import rows, settings, talks_of, write

AUTO = "proof.engine=auto"


@pytest.fixture(scope="module")
def adapter(plain, tmp_path_factory):
    return write_adapter(plain, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def vllm(monkeypatch):
    """Says whether vLLM is installed, whether it is or not."""
    real = importlib.util.find_spec

    def installed(there):
        found = importlib.util.spec_from_loader("vllm", None) if there else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: found if name == "vllm" else real(name))

    return installed


def chosen(model, adapter, *more):
    run, instead = run_config(settings(model, *more), adapter, [Aspect.QUALITY])
    return run.engine.kind, instead


def test_vllm_proves_an_adapter_where_it_can(plain, adapter, vllm):
    vllm(True)
    assert chosen(plain, adapter, AUTO) == ("vllm", None)
    vllm(False)
    assert chosen(plain, adapter, AUTO) == ("transformers", "is not installed")
    assert chosen(plain, adapter) == ("transformers", None), "as it was asked for"


def test_an_adapter_that_vllm_cannot_apply_is_proven_by_transformers(plain, tmp_path, vllm):
    vllm(True)
    dora = write_adapter(plain, tmp_path / "dora", use_dora=True)
    kind, instead = chosen(plain, dora, AUTO)
    assert kind == "transformers"
    assert instead.startswith("cannot apply the adapter (is DoRA")
    assert "m3agiqa merge-adapter" in instead
    with pytest.raises(UserError, match="is DoRA"):
        chosen(plain, dora, "proof.engine=vllm")


def test_what_takes_the_place_of_vllm_is_told(plain, adapter, tmp_path, vllm):
    vllm(False)
    talks = talks_of(write(tmp_path / "c", rows(2, ("quality",))))
    proof = prove(settings(plain, AUTO), Path(adapter), exam(talks.talks, talks.pictures, talks.shards, 2))
    note, line = proof_lines(proof)
    assert note == "note: proof.engine=auto takes transformers: vLLM is not installed"
    assert line.startswith("transformers loaded it and scored 2 images with it: quality right ")
    assert proof_lines(proof | {"instead": None}) == [line]


def card_of(tmp_path, *more):
    """The card and the sheet of an adapter, as text."""
    found = figures([Judged(Aspect.QUALITY, 1.0, 1.0, 1, 1, 2.0, 2.0)])
    facts = {"base": "d1", "aspects": ["quality"], "inputs": ["/home/alice/secret/talks/c.csv"], "counts": {}}
    facts |= {"validation": found, "step": 1, "steps": 2, "notes": []}
    config = settings(*more)
    write_card(tmp_path, config, facts | {"proof": {"images": 1, "engine": "transformers", "figures": found}})
    decides = config.model_dump(mode="json", exclude={"ray", "access"})
    write_sheet(tmp_path, config, {"training": "t1", "config": decides})
    sheet = json.loads((tmp_path / SHEET).read_text())["provenance"]
    assert sheet["training"] == "t1"
    assert set(sheet["config"]) == set(decides)
    return (tmp_path / "README.md").read_text(), json.dumps(sheet)


def test_a_card_tells_nobody_where_things_lie_here(tmp_path):
    places = ("access.roots=/home/alice/secret/pool/a,~/x,s3://pool/b", "corpus.images=/home/alice/secret/pool/images")
    card, sheet = card_of(tmp_path, "/home/alice/secret/models/base", *places, "ray.storage=/home/alice/kept")
    for text in (card, sheet):
        assert "alice" not in text.replace("alice/kept", "")
        assert "/home" not in text
    assert "base_model: models/base\n" in card
    assert "--set model.path=models/base model.adapters=FOLDER" in card
    for shown in ("`talks/c.csv`", "- pool/a\n", "- x\n", "- s3://pool/b\n", "images: pool/images\n"):
        assert shown in card
    assert '"path": "models/base"' in sheet


@pytest.mark.parametrize("model", ["tiny", "Qwen/Qwen3-VL-8B-Instruct"])
def test_a_card_names_a_public_model_as_it_is(tmp_path, model):
    card, sheet = card_of(tmp_path, model)
    assert f"base_model: {model}\n" in card
    assert f'"path": "{model}"' in sheet
