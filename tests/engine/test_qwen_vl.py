"""Qwen3-VL and Qwen2.5-VL in a real vLLM engine with capture, held against transformers in float32."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("name", ["Qwen3VL", "Qwen2_5_VL"])
def test_states_equal_transformers(name, tmp_path):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if WITHOUT_TORCHVISION:
        paths.insert(0, str(STAND_IN))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "tests.engine.qwen_vl", name, tmp_path / "model", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
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
