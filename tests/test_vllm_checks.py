"""What vLLM cannot do for a run is said in one line before any work: no cluster, no output, no engine."""

import json
import re
import shutil

import pytest
import ray

from m3agiqa.cli import main
from m3agiqa.config import load_config
from m3agiqa.engine import vllm_plugins
from m3agiqa.engine.base import create_engine
from m3agiqa.errors import UserError
from m3agiqa.models import predictor_folder
from m3agiqa.tiny.architecture import write_random_model


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))


@pytest.fixture
def installed(monkeypatch):
    """Has vLLM be of some version; of the known one unless it is said."""

    def be(version="0.32.0"):
        monkeypatch.setattr(vllm_plugins, "version", lambda name: version)

    be()
    return be


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A model as it is published, of an architecture that no states are kept of in vLLM."""
    folder = write_random_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaForConditionalGeneration"]}))
    return folder


def refused(capsys, tmp_path, command, *arguments):
    """What the command says, after it has refused to start."""
    out = tmp_path / "out"
    assert main([command, *map(str, arguments), "--output", str(out)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0.0"])
@pytest.mark.parametrize("command", ["score", "capture"])
def test_a_vllm_of_another_version_is_refused(tmp_path, demo_corpus, capsys, no_ray, installed, version, command):
    installed(version)
    settings = ["engine.kind=vllm", "predictor.path=null"]
    said = refused(capsys, tmp_path, command, "--input", demo_corpus / "manifest.csv", "--set", *settings)
    assert said.count("\n") == 1
    assert f"vLLM {version}: m3agiqa needs vLLM >=0.32,<0.33; pip install" in said


def test_an_engine_of_another_version_does_not_start(installed):
    """A node of a cluster may have another one than the machine that the run was started on."""
    installed("0.31.4")
    with pytest.raises(UserError, match=r"vLLM 0\.31\.4: m3agiqa needs vLLM >=0\.32,<0\.33"):
        create_engine(load_config(None, ["engine.kind=vllm", "model.path=tiny"]))


def test_plan_names_a_vllm_of_another_version(tmp_path, demo_corpus, capsys, installed):
    installed("0.31.4")
    arguments = ["--input", f"{demo_corpus}/manifest.csv", "--output", str(tmp_path / "out")]
    assert main(["plan", *arguments, "--set", "engine.kind=vllm"]) == 2
    assert "failed  model" in (said := capsys.readouterr().out)
    assert "vLLM 0.31.4: m3agiqa needs vLLM" in said


def test_states_that_vllm_does_not_keep_are_refused(tmp_path, demo_corpus, capsys, no_ray, installed, unknown):
    predictor = tmp_path / "predictor"
    shutil.copytree(predictor_folder(load_config(None, [])), predictor)
    model = ["--input", demo_corpus / "manifest.csv", "--set", "engine.kind=vllm", f"model.path={unknown}"]
    rule = (
        r"architecture LlavaForConditionalGeneration: hidden states can be captured in vLLM from .*"
        r"Qwen3VLForConditionalGeneration.* only; use engine\.kind=transformers"
    )
    for command, more in (
        ("capture", ()),
        ("score", ("capture.kind=top_k",)),
        ("score", (f"predictor.path={predictor}",)),
    ):
        said = refused(capsys, tmp_path, command, *model, *more)
        assert said.count("\n") == 1
        assert re.search(rule, said), said


def test_plan_names_the_model_whose_states_vllm_does_not_keep(tmp_path, demo_corpus, capsys, installed, unknown):
    arguments = ["--input", f"{demo_corpus}/manifest.csv", "--output", str(tmp_path / "out")]
    settings = ["--set", "engine.kind=vllm", f"model.path={unknown}"]
    assert main(["plan", *arguments, *settings, "capture.kind=states"]) == 2
    assert "failed  model      architecture Llava" in capsys.readouterr().out
    main(["plan", *arguments, *settings, f"predictor.path={predictor_folder(load_config(None, []))}"])
    assert "failed  predictor  architecture Llava" in capsys.readouterr().out


def test_without_states_the_model_is_taken(installed, unknown):
    from m3agiqa.runs import fingerprint_parts

    parts = fingerprint_parts(load_config(None, ["engine.kind=vllm", f"model.path={unknown}"]))
    assert parts["engine"]["version"] == "vllm 0.32.0"
