"""Qwen3-VL and Qwen2.5-VL in a real vLLM engine with capture, held against transformers in float32."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m3agiqa.config import ModelConfig
from m3agiqa.engine.prompting import load_processor
from m3agiqa.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in")


WITHOUT_TORCHVISION = importlib.util.find_spec("torchvision") is None


def run(what: str, name: str, folder: Path) -> dict[str, Any]:
    """The other program's findings."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if WITHOUT_TORCHVISION:
        paths.insert(0, str(STAND_IN))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "tests.engine.qwen_vl", what, name, folder / "model", folder / "out.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@pytest.mark.parametrize("name", ["Qwen3VL", "Qwen2_5_VL"])
def test_states_equal_transformers(name, tmp_path):
    found = run("compare", name, tmp_path)
    assert len(found["errors"]) == 24
    assert all(found["same_words"])
    assert all(found["same_shapes"])
    assert max(found["errors"]) < 1e-4
    assert found["apart"] > 0.05, "the picture makes no difference"
    assert found["parents"][1] == f"{name}ForConditionalGeneration"
    if WITHOUT_TORCHVISION:
        # This process, which has no stand-in, cannot load such a model, and says why.
        with pytest.raises(UserError, match=r"its processor needs a package that is not installed .*Torchvision"):
            load_processor(tmp_path / "model", ModelConfig(path=str(tmp_path / "model")))
    assert found["stats"]["prefix_cache_hits"] > 24 * 32, "the prefix cache was not used"


def test_a_picture_that_does_not_fit_is_downscaled_if_asked(tmp_path):
    found = run("downscale", "Qwen3VL", tmp_path)
    assert found["vllm"] == found["transformers"]
    notes = [row[0] for row in found["vllm"]]
    assert None in notes, "no picture fitted as it is"
    assert any(note is not None and note.startswith("image downscaled to ") for note in notes)
    assert max(row[3] for row in found["vllm"]) < found["context"]
