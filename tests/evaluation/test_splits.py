"""Splits: what stays whole, how near the shares are, what the parts share, and what is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ImageEnhance

from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.evaluation import overlap, splits
from tests.corpora import picture
from tests.evaluation.evaluating import labelled, write


def parts_of(file):
    rows = pq.read_table(file).to_pylist()
    return {row["id"]: row["part"] for row in rows}


def test_prompts_stay_whole_and_parts_are_alike(tmp_path, capsys):
    rows = labelled(400)
    table = write(tmp_path / "t.csv", rows)
    out = tmp_path / "split.parquet"
    shares = "train=0.7,val=0.1,test=0.2"
    assert main(["split", "--input", table, "--out", str(out), "--label", "mos_q", "--shares", shares]) == 0
    said = capsys.readouterr().out
    assert "0 of" in said
    parts = parts_of(out)
    assert len(parts) == 400
    for prompt in {row["prompt"] for row in rows}:
        assert len({parts[row["id"]] for row in rows if row["prompt"] == prompt}) == 1
    sheet = json.loads((tmp_path / "split.parquet.json").read_text())
    assert {name: one["rows"] for name, one in sheet["parts"].items()} == {"train": 280, "val": 40, "test": 80}
    means = [one["mean_label"] for one in sheet["parts"].values()]
    assert max(means) - min(means) < 0.25
    assert all(one["shared"] == 0 for one in sheet["shared_prompts"].values())
    assert sheet["shared_generators"]["train, test"]["rows_share"] == 1.0
    assert sheet["near_duplicates"]["reason"].startswith("none of 400 images")


def test_the_same_seed_gives_the_same_split_in_any_order(tmp_path):
    rows = labelled(100)
    files = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        table = write(tmp_path / f"{name}.csv", order)
        files.append(tmp_path / f"{name}-split.csv")
        assert main(["split", "--input", table, "--out", str(files[-1]), "--by", "random", "--no-images"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    other = tmp_path / "other.csv"
    more = ["--by", "random", "--seed", "1", "--no-images"]
    assert main(["split", "--input", str(tmp_path / "a.csv"), "--out", str(other), *more]) == 0
    assert other.read_bytes() != files[0].read_bytes()


def test_a_stratified_split_is_the_same_in_any_order(tmp_path):
    # Scores with one decimal: many groups have the same mean but for the last bit of the sum, which the order decides.
    rows = [row | {"mos_q": round(row["mos_q"], 1)} for row in labelled(500)]
    made = set()
    for seed in range(4):
        shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        table, out = write(tmp_path / f"{seed}.csv", shuffled), tmp_path / f"{seed}-split.csv"
        assert main(["split", "--input", table, "--out", str(out), "--label", "mos_q", "--no-images"]) == 0
        sheet = json.loads((tmp_path / f"{seed}-split.csv.json").read_text())
        made.add((out.read_bytes(), json.dumps(sheet["parts"])))
    assert len(made) == 1


def test_folds_and_generators(tmp_path):
    table = write(tmp_path / "t.csv", labelled(100))
    out = tmp_path / "folds.parquet"
    assert main(["split", "--input", table, "--out", str(out), "--by", "random", "--folds", "5", "--no-images"]) == 0
    values = list(parts_of(out).values())
    assert {name: values.count(name) for name in set(values)} == {f"fold-{i}": 20 for i in range(5)}
    out = tmp_path / "generators.parquet"
    by = ["--by", "generator", "--shares", "train=0.5,test=0.5", "--no-images"]
    assert main(["split", "--input", table, "--out", str(out), *by]) == 0
    sheet = json.loads((tmp_path / "generators.parquet.json").read_text())
    assert sheet["shared_generators"]["train, test"] == {"shared": 0, "of": 2, "rows_share": 0.0}


def test_published_conversations_are_a_split(tmp_path):
    def talk(name):
        said = ["It's original prompt is: 'a cat'. Look.", "fine", "Rate.", "good"]
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        return {"id": "0", "image": f"/home/authors/images/{name}.png", "conversations": messages}

    rows = labelled(10)
    table = write(tmp_path / "t.csv", rows)
    for part, names in (("train", range(7)), ("test", range(7, 9))):
        items = [talk(f"{i:04}") | {"id": str(i)} for i in names]
        (tmp_path / f"{part}.json").write_text(json.dumps(items))
    out = tmp_path / "official.csv"
    files = [f"{part}={tmp_path}/{part}.json" for part in ("train", "test")]
    assert main(["split", "--input", table, "--out", str(out), "--by", "official", "--official", *files]) == 0
    lines = [line.replace('"', "") for line in out.read_text().splitlines()[1:]]
    assert lines == [f"i{i:04},{i:04}.png,{'train' if i < 7 else 'test'}" for i in range(9)]


def test_near_duplicates_across_parts_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    rows = labelled(6)
    rng = np.random.default_rng(0)
    for i in range(5):
        size = (int(rng.integers(80, 120)), int(rng.integers(60, 90)))
        noisy = picture(*size, seed=i).rotate(17 * i)
        noisy.save(tmp_path / rows[i]["image_path"])
    ImageEnhance.Brightness(picture(100, 80, seed=2).rotate(34)).enhance(1.02).save(tmp_path / rows[5]["image_path"])
    ImageEnhance.Brightness(picture(100, 80, seed=2).rotate(34)).enhance(1.0).save(tmp_path / rows[2]["image_path"])
    hashes, failed = overlap.hashes(write(tmp_path / "t.csv", rows))
    assert (len(hashes), failed) == (6, 0)
    ids = [row["id"] for row in rows]
    parts = ["train"] * 4 + ["test"] * 2
    found = overlap.near_duplicates(ids, parts, hashes, 4)["test, train"]
    assert ["i0005", "i0002"] in found["first"]
    same = overlap.near_duplicates(ids, ["train"] * 6, hashes, 4)
    assert same == {}


def test_near_duplicates_are_found_by_ids_of_another_name(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    rows = [{"name": f"n{i}", "image_path": f"images/{i}.png"} for i in range(20)]
    for row in rows:
        picture(90, 70, seed=1).save(tmp_path / row["image_path"])
    table = write(tmp_path / "t.csv", rows)
    more = ["--out", str(tmp_path / "s.csv"), "--by", "random", "--id-column", "name"]
    assert main(["split", "--input", table, *more]) == 0
    assert f"near-duplicate images of test, train: {4 * 16} pairs" in capsys.readouterr().out


def refused(capsys, *args):
    assert main(["split", *args]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    return line


def test_what_cannot_be_split_is_refused(tmp_path, capsys):
    rows = labelled(20)
    table = write(tmp_path / "t.csv", rows)
    out = ["--input", table, "--out", str(tmp_path / "s.csv")]
    assert "sums to 0.9" in refused(capsys, *out, "--shares", "train=0.8,test=0.1")
    assert "PART=SHARE" in refused(capsys, *out, "--shares", "train")
    assert "only 4 groups" in refused(capsys, *out, "--folds", "5", "--by", "generator")
    assert "no column split" in refused(capsys, *out, "--by", "official")
    assert "mos_q" in refused(capsys, *out, "--label", "mos_qq")
    assert "s3://bucket/s.csv: is not on this" in refused(capsys, "--input", table, "--out", "s3://bucket/s.csv")
    folder = tmp_path / "none"
    nowhere = ["--dataset", "agiqa-3k", "--input", str(folder), "--out", str(tmp_path / "s.csv")]
    assert f"--input {folder}: is no folder" in refused(capsys, *nowhere)
    assert "neither .parquet" in refused(capsys, "--input", table, "--out", str(tmp_path / "s.txt"))
    bare = write(tmp_path / "bare.csv", rows, ["id", "image_path"])
    assert "no row has a prompt" in refused(capsys, "--input", bare, "--out", str(tmp_path / "s.csv"))
    twice = write(tmp_path / "twice.csv", [*rows, rows[3]])
    assert "i0003" in refused(capsys, "--input", twice, "--out", str(tmp_path / "s.csv"))
    (tmp_path / "there.csv").write_text("id,part\n")
    assert "there already" in refused(capsys, "--input", table, "--out", str(tmp_path / "there.csv"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.csv", "t.csv", "there.csv", "twice.csv"]


def test_parts_by_other_names():
    assert splits.official(["training", "valid", "test", None], "x") == ["train", "val", "test", None]
    with pytest.raises(UserError, match="'dev'"):
        splits.official(["train", "dev"], "x")
