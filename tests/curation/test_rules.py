"""Every rule on small scores, through the whole of `curate`; none of these reads an image or starts Ray."""

import json

import numpy as np
import pyarrow as pa
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.curate import curate
from m3agiqa.errors import UserError
from tests.curation.scored import kept, kept_ids, recipe, removed, scored, write_scores


@pytest.fixture
def curated(tmp_path):
    """Curates rows with a recipe of overrides, and gives the folder."""

    def run(rows, *overrides, **options):
        write_scores(tmp_path / "run", rows, **options)
        curate(recipe(*overrides), str(tmp_path / "run"), str(tmp_path / "out"))
        return tmp_path / "out"

    return run


def test_thresholds_intervals_and_other_columns_together(curated):
    rows = [scored("a", 4.0), scored("b", 3.4), scored("c", 2.0), scored("d", 4.5, generator="two"), scored("e", None)]
    where = ["quality_mos > 3", "quality_mos_low > 3", "generator = 'one' AND len(quality_rating_probs) = 5"]
    out = curated(rows, f"rows.where={json.dumps(where)}")
    assert kept_ids(out) == ["a"]
    assert removed(out) == {
        "b": "where: quality_mos_low > 3",
        "c": "where: quality_mos > 3",
        "d": f"where: {where[2]}",
        "e": "where: quality_mos > 3",
    }


def test_rows_that_are_not_ok_go_first_and_the_funnel_adds_up(curated):
    rows = [scored("a", 4.0), scored("b", None, status="rejected"), scored("c", 4.0, status="failed"), scored("d", 1.0)]
    out = curated(rows, "rows.where=quality_mos > 3")
    sheet = json.loads((out / "curation.json").read_text())
    assert sheet["funnel"] == [
        {"rule": "input", "dropped": 0, "left": 4},
        {"rule": "status", "dropped": 2, "left": 2},
        {"rule": "where: quality_mos > 3", "dropped": 1, "left": 1},
    ]
    assert (sheet["rows"], sheet["fingerprint"]) == (1, rows[0]["fingerprint"])
    assert sheet["recipe_hash"] == recipe("rows.where=quality_mos > 3").digest()


def test_kept_rows_are_as_they_were(curated):
    rows = [scored(name, mos, seed=7) for name, mos in (("b", 3.25), ("a", 4.0))]
    out = curated(rows, "rows.where=quality_mos > 1", passing=[pa.field("seed", pa.int64())])
    for row, found in zip(sorted(rows, key=lambda row: row["id"]), kept(out), strict=True):
        assert {name: found[name] for name in row} == row


def test_sizes(curated):
    sizes = {"a": (640, 480), "small": (300, 900), "large": (640, 4000), "wide": (2000, 600), "none": (None, None)}
    rows = [scored(name, 4.0, width=width, height=height) for name, (width, height) in sizes.items()]
    out = curated(rows, "size.min_side=400", "size.max_side=3000", "size.max_aspect=2")
    assert kept_ids(out) == ["a"]
    assert removed(out) == {
        "small": "size.min_side: 400",
        "none": "size.min_side: 400",
        "large": "size.max_side: 3000",
        "wide": "size.max_aspect: 2",
    }


def test_of_exact_copies_the_best_stays_and_equals_are_decided_by_id(curated):
    rows = [scored("a", 3.0, image_sha256="x"), scored("b", 4.0, image_sha256="x"), scored("c", 1.0)]
    rows += [scored(name, 2.0, image_sha256="y") for name in ("f", "e")]
    rows += [scored(name, 2.0, image_sha256=None) for name in ("g", "h")]
    out = curated(rows, "duplicates.exact=true")
    assert kept_ids(out) == ["b", "c", "e", "g", "h"]
    assert set(removed(out).values()) == {"duplicates.exact"}


@pytest.mark.parametrize(("within", "expected"), [("", ["g", "h", "i", "j"]), ("generator", ["d", "e", "i", "j"])])
def test_quantiles_of_all_and_of_each_generator(curated, within, expected):
    rows = [scored(name, 1.0 + i / 10, generator="weak") for i, name in enumerate("abcde")]
    rows += [scored(name, 3.0 + i / 10, generator="strong") for i, name in enumerate("fghij")]
    overrides = ["quantile.top={quality_mos: 0.4}", *([f"quantile.within={within}"] if within else [])]
    assert kept_ids(curated(rows, *overrides)) == expected


def test_the_composite_is_the_weighted_mean_and_orders_the_best_of_a_prompt(curated):
    rows = [
        scored("a", 4.0, authenticity_mos=1.0),
        scored("b", 3.0, authenticity_mos=4.0),
        scored("c", 3.0, authenticity_mos=4.0),
        scored("d", 1.0, authenticity_mos=1.0, prompt="another"),
        scored("e", 5.0, authenticity_mos=None),
        *(scored(name, 0.5, authenticity_mos=0.0, prompt=None) for name in ("f", "g")),
    ]
    out = curated(rows, "composite.weights={quality_mos: 1, authenticity_mos: 3}", "best.per_prompt=1")
    assert {row["id"]: row["composite"] for row in kept(out)} == {"b": 3.75, "d": 1.0, "f": 0.125, "g": 0.125}


def test_the_best_of_all_by_the_score_that_is_there(curated):
    rows = [scored(name, None, quality_rating_score=score) for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    assert kept_ids(curated(rows, "best.top=2")) == ["b", "c"]


@pytest.mark.parametrize(
    ("shares", "expected"), [("proportional", {"one": 6, "two": 2}), ("equal", {"one": 4, "two": 4})]
)
def test_a_sample_of_strata_is_random_but_always_the_same(tmp_path, shares, expected):
    rows = [scored(f"{i:03d}", 3.0, generator="two" if i % 4 == 0 else "one") for i in range(80)]
    write_scores(tmp_path / "run", rows)
    rules = ["sample.size=8", "sample.strata=generator", f"sample.shares={shares}"]
    ids = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        curate(recipe(*rules, f"sample.seed={seed}"), str(tmp_path / "run"), str(tmp_path / name))
        ids.append(kept_ids(tmp_path / name))
        generators = [row["generator"] for row in kept(tmp_path / name)]
        assert {one: generators.count(one) for one in set(generators)} == expected
    assert ids[0] == ids[1] != ids[2]


def test_the_split_keeps_prompts_whole(curated):
    rows = [scored(f"{i:03d}", 3.0, prompt=f"prompt {i // 5}") for i in range(100)]
    out = curated(rows, "split.validation=0.2")
    parts = {}
    for row in kept(out):
        parts.setdefault(row["prompt"], set()).add(row["split"])
    assert all(len(found) == 1 for found in parts.values())
    assert [row["split"] for row in kept(out)].count("val") == 20
    assert json.loads((out / "curation.json").read_text())["split"] == {"train": 80, "val": 20}


def test_pairs_are_of_one_prompt_with_a_margin_and_no_image_is_in_two(curated):
    rows = [scored(name, mos) for name, mos in (("a", 1.0), ("b", 4.0), ("c", 3.0), ("d", 2.5), ("e", 4.5))]
    rows += [scored("f", 5.0, prompt="another"), scored("g", 4.75, prompt="another"), scored("h", None)]
    rows += [scored(name, mos, prompt=None) for name, mos in (("i", 1.0), ("j", 5.0))]
    out = curated(rows, "pairs.margin=1", "pairs.per_prompt=5", "pairs.by=quality_mos")
    pairs = pa.parquet.read_table(out / "pairs.parquet").to_pylist()
    assert [(row["chosen_id"], row["rejected_id"], row["chosen"] - row["rejected"]) for row in pairs] == [
        ("b", "d", 1.5),
        ("e", "a", 3.5),
    ]
    assert {row["prompt"] for row in pairs} == {"a red fox"}
    assert pairs[1]["chosen_image"] == "/pictures/e.png"


def states(*numbers: float) -> bytes:
    """bfloat16 of numbers that it can hold."""
    return (np.array(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_captured_states_that_point_one_way_are_duplicates(curated):
    captured = {"a": states(1, 0, 3, 0), "b": states(2, 0.125, 2, 0), "c": states(0, 1, 0, 1), "d": None}
    rows = [
        scored(name, 3.0 + (name == "b"), quality_states=data, quality_tokens=None if data is None else 2)
        for name, data in captured.items()
    ]
    out = curated(rows, "duplicates.similarity=0.95", states=[Aspect.QUALITY])
    assert kept_ids(out) == ["b", "c", "d"]
    assert removed(out) == {"a": "duplicates.similarity: 0.95"}
    assert "quality_states" not in kept(out)[0]


def test_a_curated_set_can_be_curated_again(curated, tmp_path):
    rows = [scored("a", 4.0), scored("b", 3.0), scored("c", 2.0)]
    out = curated(rows, "rows.where=quality_mos > 2.5", "composite.weights={quality_mos: -1, quality_mos_low: 2}")
    curate(recipe("best.top=1", "rows.where=composite < 3"), str(out), str(tmp_path / "again"))
    assert [(row["id"], row["composite"]) for row in kept(tmp_path / "again")] == [("b", 2.0)]
    sheets = [json.loads((one / "curation.json").read_text()) for one in (out, tmp_path / "again")]
    assert sheets[0]["origin"] == sheets[1]["origin"]


def test_a_repeated_id_is_refused(curated, tmp_path):
    with pytest.raises(UserError, match="more than once"):
        curated([scored("a", 4.0), scored("a", 4.0)])
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
