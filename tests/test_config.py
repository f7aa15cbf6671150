from pathlib import Path

import pytest
from pydantic import ValidationError

from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig, load_config
from m3agiqa.errors import UserError
from m3agiqa.settings import describe_config, dump_config

# Of scoring runs; those of training are checked beside what they train.
OTHERS = {
    "train_predictor.yaml",
    "distil.yaml",
    "finetune.yaml",
    "tiny_adapter.yaml",
    "ablate.yaml",
    "curate.yaml",
    "evaluate.yaml",
}
CONFIGS = sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*.yaml") if p.name not in OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    assert load_config(path) != RunConfig()


def test_there_are_configs_for_the_tiny_the_published_and_a_current_model():
    paths = {load_config(path).model.path for path in CONFIGS}
    assert "tiny" in paths
    assert any("minicpm" in p for p in paths)
    assert any("Qwen" in p for p in paths)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("engine.knd=vllm", "engine.kind"),
        ("engin.kind=vllm", "engine"),
        ("batch_siz=3", "batch_size"),
        ("scoring.aspect=quality", "scoring.aspects"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(override, nearest):
    with pytest.raises(UserError, match=nearest):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("engine.kind=tensorrt", "tensorrt"),
        ("ray.actors=[3,1]", r"\[3, 1\]"),
        ("ray.actors=0", "at least 1"),
        ("scoring.aspects=[]", "aspects"),
        ("scoring.aspects=beauty", "beauty"),
        ("scoring.conversation=v9", "published"),
        ("images.max_pixels=-1", "max_pixels"),
        ("engine=3", "engine"),
        ("engine.kind.x=3", "kind"),
        ("engine.cpu_kv_cache_gib=.inf", "cpu_kv_cache_gib"),
        ("nonsense", "key=value"),
        ("model.path=[", "YAML"),
    ],
)
def test_a_bad_value_is_named(override, named):
    with pytest.raises(UserError, match=named):
        load_config(None, ["engine.kind=vllm", override])


def test_overrides_change_a_file_and_survive_a_round_trip(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("engine:\n  kind: transformers\n")
    config = load_config(file, ["scoring.aspects=authenticity,quality", "ray.actors=[1,4]"])
    assert config.engine.kind == "transformers"
    assert config.scoring.aspects == (Aspect.QUALITY, Aspect.AUTHENTICITY)
    assert config.ray.actors == (1, 4)
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize("text", ["- a\n- b\n", "engine: [", "engine:\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        load_config(file)


def test_a_missing_file_is_refused():
    with pytest.raises(UserError, match="does not exist"):
        load_config("/nowhere/c.yaml")


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        load_config().engine.kind = "simulated"  # type: ignore[misc]


def test_every_key_is_documented():
    docs = describe_config(RunConfig)
    for section, field in RunConfig.model_fields.items():
        assert field.annotation.__doc__, section
        for key, info in field.annotation.model_fields.items():
            assert info.description, f"{section}.{key}"
            assert f"  {key}: " in docs
