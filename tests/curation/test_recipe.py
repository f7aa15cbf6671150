from pathlib import Path

import pytest
import yaml

from m3agiqa.cli import main
from m3agiqa.curation.recipe import Recipe
from m3agiqa.errors import UserError
from m3agiqa.settings import dump_config, load
from tests.curation.scored import opened, recipe, scored, write_scores

ROOT = Path(__file__).parents[2]


def documented() -> list[str]:
    """The recipes in the documentation."""
    blocks = (ROOT / "docs" / "curation.md").read_text().split("```yaml\n")[1:]
    return [block.split("```")[0] for block in blocks]


def test_the_recipes_that_are_shipped_and_documented_can_be_read(tmp_path):
    texts = [(ROOT / "configs" / "curate.yaml").read_text(), *documented()]
    assert len(texts) >= 2
    rows = [scored("a", 4.0, correspondence_mos=1.0, authenticity_mos=1.0)]
    scores = opened(write_scores(tmp_path / "run", rows), tmp_path / "work")
    for place, text in enumerate(texts):
        (tmp_path / f"{place}.yaml").write_text(text)
        found = load(Recipe, tmp_path / f"{place}.yaml")
        assert found.rules() != Recipe().rules()
        for condition in found.rows.where:
            scores.parse(condition, "rows.where")
    scores.close()


def test_a_recipe_says_the_same_when_it_is_read_back(tmp_path):
    first = recipe("rows.where=a > 1", "quantile.top={composite: 0.5}", "sample.strata=[generator, prompt]")
    assert first.rows.where == ("a > 1",)
    assert first.sample.strata == ("generator", "prompt")
    (tmp_path / "again.yaml").write_text(dump_config(first))
    assert load(Recipe, tmp_path / "again.yaml") == first


def test_the_digest_is_of_the_rules_and_of_nothing_else():
    assert recipe("resources.threads=1").digest() == recipe("resources.memory_gib=9").digest()
    assert recipe("best.top=5").digest() != recipe("best.top=6").digest()
    assert "resources" not in recipe().rules()


@pytest.mark.parametrize("bad", ["quantile.top={a: 0}", "duplicates.distance=17", "split.validation=1", "best.top=0"])
def test_values_that_mean_nothing_are_refused(bad):
    with pytest.raises(UserError, match=bad.split("=")[0]):
        recipe(bad)


def test_every_key_is_documented(capsys):
    assert main(["config", "--docs", "--kind", "curate"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told == Recipe().model_dump(mode="json")
