"""The configuration of a distillation, and the labels' bins that it states."""

from pathlib import Path

import pytest
import yaml

from m3agiqa.aspects import Aspect
from m3agiqa.cli import main
from m3agiqa.distil.tasks import labels_of
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.settings import describe_config, dump_config, load

SHIPPED = Path(__file__).parent.parent.parent / "configs" / "distil.yaml"


def test_the_shipped_config_is_valid_and_holds_no_key():
    config = load(DistilConfig, SHIPPED)
    assert config != DistilConfig()
    assert config.teacher.key_env == "OPENAI_API_KEY"
    assert config.budget.input_price


def test_every_field_is_documented_and_reachable(capsys, tmp_path):
    assert main(["config", "--kind", "distil", "--docs"]) == 0
    docs = capsys.readouterr().out
    assert docs.strip() == describe_config(DistilConfig)
    assert "None" not in docs
    assert yaml.safe_load(docs) == DistilConfig().model_dump(mode="json")
    assert main(["config", "--kind", "distil", "--set", "limits.retries=1"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert load(DistilConfig, tmp_path / "c.yaml") == load(DistilConfig, None, ["limits.retries=1"])
    assert dump_config(DistilConfig())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teacher.base_url=ftp://x/v1", "no http or https URL"),
        ("teacher.base_url=https://me:secret@x/v1", "would be written down"),
        ("budget.max_cost=3", "needs the prices"),
        ("ratings.dataset=koniq", "agiqa-3k"),
        ("ratings.edges={quality: [1, 2, 2, 4]}", "do not ascend"),
        ("teacher.key=sk-1", "teacher.key_env"),
        ("images.encoding=gif", "png"),
    ],
)
def test_a_bad_value_is_named(override, told):
    with pytest.raises(UserError, match=told) as caught:
        load(DistilConfig, None, [override])
    assert "config --docs --kind distil" in str(caught.value) or "did you mean" in str(caught.value)
    assert "secret" not in str(caught.value)


def bins(
    *overrides: str, aspect: Aspect = Aspect.QUALITY, scale: tuple[float, float] = (0.0, 5.0)
) -> tuple[float, ...]:
    ratings = load(DistilConfig, None, list(overrides)).ratings
    return labels_of({aspect: "mos"}, scale, ratings).bins[aspect].edges


def test_bins_are_equal_named_or_given():
    assert bins() == (1, 2, 3, 4)
    assert bins(scale=(0.0, 100.0)) == (20, 40, 60, 80)
    assert bins("ratings.dataset=aigciqa2023", aspect=Aspect.AUTHENTICITY) == (20, 40, 60, 80)
    assert bins("ratings.dataset=agiqa-3k", "ratings.edges={quality: [2, 2.5, 3, 4]}") == (2, 2.5, 3, 4)
    with pytest.raises(UserError, match="states no bins for authenticity"):
        bins("ratings.dataset=agiqa-3k", aspect=Aspect.AUTHENTICITY)
    with pytest.raises(UserError, match="does not go up"):
        bins(scale=(5.0, 0.0))
