"""Whole runs on a real Ray cluster, with the simulated engine: every input, every row, once."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig, load_config
from m3agiqa.errors import UserError
from m3agiqa.pipeline import run_scoring
from m3agiqa.runs import Output
from tests.corpora import encode, picture, write_bad_inputs, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["engine.kind=simulated", "ray.num_cpus=0.5", *overrides])


def rows_of(output: Path | str) -> list[dict]:
    return Output(str(output)).rows().to_pylist()


@pytest.mark.parametrize("kind", ["simulated", "vllm", "transformers"])
def test_every_bad_input_gives_exactly_one_row_and_never_a_zero(tmp_path, kind):
    expected = write_bad_inputs(tmp_path / "in")
    if kind != "simulated":
        # 50 kB of prompt are more than the model's context; without a model there is no context.
        expected["long_prompt"] = "rejected"
    manifest = run_scoring(config(f"engine.kind={kind}"), str(tmp_path / "in" / "manifest.csv"), str(tmp_path / "out"))
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert {case: row["status"] for case, row in rows.items()} == expected
    assert sum(manifest.counts.values()) == len(expected) == len(rows_of(tmp_path / "out"))
    for row in rows.values():
        if row["status"] == "rejected":
            assert row["error"]
            assert "Traceback" not in row["error"]
            assert all(row[f"{a}_rating_score"] is None and row[f"{a}_rating"] is None for a in Aspect)
        else:
            assert row["quality_rating_score"] is not None
            assert (row["correspondence_rating_score"] is None) == (row["prompt"] is None)


def test_a_folder_of_bad_files_gives_a_row_for_each_file(tmp_path):
    write_bad_inputs(tmp_path / "in")
    (tmp_path / "in" / "manifest.csv").unlink()
    (tmp_path / "in" / "good.txt").write_text("a red fox <image>")
    run_scoring(config(), str(tmp_path / "in"), str(tmp_path / "out"))
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {file.name for file in (tmp_path / "in").iterdir() if file.suffix != ".txt"}
    assert rows["good.png"]["prompt"] == "a red fox <image>"
    assert rows["cmyk.jpg"]["prompt"] is None
    assert rows["cmyk.jpg"]["error"] == "correspondence: not judged, the row has no prompt"


def test_a_run_goes_on_with_what_is_new(tmp_path, demo_corpus):
    folder = tmp_path / "in"
    shutil.copytree(demo_corpus, folder)
    lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    (folder / "manifest.csv").write_text("".join(lines[:11]))
    out = tmp_path / "out"
    assert run_scoring(config(), str(folder / "manifest.csv"), str(out)).counts == {"ok": 10}
    (folder / "manifest.csv").write_text("".join(lines))
    assert run_scoring(config(), str(folder / "manifest.csv"), str(out)).counts == {"ok": len(lines) - 1}
    ids = [row["id"] for row in rows_of(out)]
    assert len(set(ids)) == len(ids) == len(lines) - 1
    files = sorted((out / "scores").iterdir())
    # A third time there is nothing to do: not a file more, and the same counts.
    assert run_scoring(config(), str(folder / "manifest.csv"), str(out)).counts == {"ok": len(lines) - 1}
    assert sorted((out / "scores").iterdir()) == files


@pytest.fixture(scope="module")
def scored(demo_corpus, tmp_path_factory, local_ray):
    """The folder and the manifest of a run over the demo, in several files."""
    out = tmp_path_factory.mktemp("scored")
    return out, run_scoring(
        config("ray.rows_per_file=8", "ray.batch_size=4"), str(demo_corpus / "manifest.csv"), str(out)
    )


def test_another_configuration_may_not_write_into_the_same_output(scored, demo_corpus):
    out, _ = scored
    before = rows_of(out)
    with pytest.raises(UserError, match=r"scoring\.aspects"):
        run_scoring(config("scoring.aspects=quality"), str(demo_corpus / "manifest.csv"), str(out))
    assert rows_of(out) == before


def test_all_files_have_the_one_schema_and_further_columns_pass_through(scored, demo_corpus):
    out, manifest = scored
    files = sorted((out / "scores").glob("*.parquet"))
    assert len(files) > 1
    schemas = [pq.read_schema(file) for file in files]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    source = {row["image_path"]: row for row in csv.DictReader((demo_corpus / "manifest.csv").open())}
    for row in rows_of(out):
        name = row["image"].removeprefix(str(demo_corpus) + "/")
        assert row["case"] == source[name]["case"]
        assert row["prompt"] == (source[name]["prompt"] or None)
        assert row["fingerprint"] == manifest.fingerprint


def test_only_the_chosen_aspects_are_judged(tmp_path, demo_corpus):
    run_scoring(config("scoring.aspects=authenticity"), str(demo_corpus / "manifest.csv"), str(tmp_path))
    for row in rows_of(tmp_path):
        assert row["authenticity_rating"] is not None
        assert row["quality_rating"] is None
        assert row["correspondence_description"] is None


def test_the_same_image_gets_the_same_scores_from_every_kind_of_input(tmp_path, demo_corpus):
    """A folder, a CSV, JSON lines, parquet with embedded bytes and tars of the same pictures."""
    import io
    import tarfile

    import pyarrow as pa

    source = list(csv.DictReader((demo_corpus / "manifest.csv").open()))[:6]
    folder = tmp_path / "folder"
    folder.mkdir()
    embedded, lines = [], []
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i, row in enumerate(source):
            data = (demo_corpus / row["image_path"]).read_bytes()
            suffix = Path(row["image_path"]).suffix
            (folder / f"{i}{suffix}").write_bytes(data)
            if row["prompt"]:
                (folder / f"{i}.txt").write_text(row["prompt"])
            embedded.append({"image": data, "prompt": row["prompt"]})
            lines.append(json.dumps({"image_path": str(demo_corpus / row["image_path"]), "prompt": row["prompt"]}))
            for name, content in ((f"{i}{suffix}", data), (f"{i}.txt", row["prompt"].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "embedded.parquet")
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    found = {}
    for name in ("folder", "embedded.parquet", "m.jsonl", "shard-0.tar"):
        run_scoring(config(f"access.roots={demo_corpus}"), str(tmp_path / name), str(tmp_path / f"out-{name}"))
        rows = rows_of(tmp_path / f"out-{name}")
        assert len(rows) == len(source)
        assert all(row["status"] == "ok" and row["id"] and row["image"] for row in rows)
        found[name] = {
            (r["image_sha256"], r["prompt"]): (r["quality_rating_probs"], r["correspondence_rating"]) for r in rows
        }
    assert all(f == found["folder"] for f in found.values())


def test_corpus_and_output_on_an_object_store(bucket, demo_corpus):
    """The whole command, in a process of its own that knows the server by the usual variables only."""
    for file in demo_corpus.rglob("*"):
        if file.is_file():
            bucket(f"corpus/{file.relative_to(demo_corpus)}", file.read_bytes())
    root = "s3://m3agiqa-corpus"
    command = [
        sys.executable, "-m", "m3agiqa.cli", "score", "--input", f"{root}/corpus/manifest.csv",
        "--output", f"{root}/runs/one", "--set", "engine.kind=simulated",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = rows_of(f"{root}/runs/one")
    assert len({row["id"] for row in rows}) == len(rows) == len(list(demo_corpus.rglob("*.*"))) - 1
    assert all(row["status"] == "ok" for row in rows)


def test_an_error_of_the_user_found_by_an_actor_is_one_line(tmp_path, demo_corpus):
    bad = config("engine.kind=vllm", "engine.vllm_args={no_such_argument: 1}")
    with pytest.raises(UserError, match="no_such_argument"):
        run_scoring(bad, str(demo_corpus / "manifest.csv"), str(tmp_path / "out"))


def test_an_error_of_the_user_found_while_reading_is_one_line(tmp_path):
    """Only the first tar of several is looked into before the run; prompts that stand alone are refused."""
    image = encode(picture())
    write_tar(tmp_path / "0.tar", [("a.png", image), ("a.txt", b"a")])
    write_tar(tmp_path / "1.tar", [("a.png", image), ("b.png", image), ("b.txt", b"b"), ("a.txt", b"a")])
    with pytest.raises(UserError, match=r"1\.tar"):
        run_scoring(config(), str(tmp_path / "*.tar"), str(tmp_path / "out"))


def test_memory_of_a_table_is_bounded_by_slices(tmp_path, demo_corpus):
    """Decoding hands over a slice at a time, in order, whatever the size of a block."""
    from m3agiqa.corpus import open_corpus
    from m3agiqa.decoding import decode_rows

    corpus = open_corpus(str(demo_corpus / "manifest.csv"))
    table = next(corpus.shards[0].read())
    slices = list(decode_rows(table, config().images, corpus.access, slice_rows=5))
    assert [s.num_rows for s in slices] == [5] * (table.num_rows // 5) + [table.num_rows % 5] * bool(table.num_rows % 5)
    assert [i for s in slices for i in s["id"].to_pylist()] == table["id"].to_pylist()


def test_scores_open_with_other_readers(scored):
    out, _ = scored
    table = ds.dataset(str(out / "scores")).to_table(filter=ds.field("quality_rating_score") >= 0)
    assert table.num_rows == len(rows_of(out))
