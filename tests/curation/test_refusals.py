"""What cannot be curated is said in one line, and leaves nothing behind."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest

from m3agiqa.cli import main
from m3agiqa.curate import curate
from m3agiqa.errors import UserError
from tests.curation.scored import opened, recipe, scored, write_scores


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    rows = [scored("a", 4.0), scored("b", 3.0, prompt="two"), scored("c", 2.0)]
    return write_scores(tmp_path_factory.mktemp("scored") / "run", rows)


@pytest.fixture(scope="module")
def scores(run_folder, tmp_path_factory):
    found = opened(run_folder, tmp_path_factory.mktemp("work") / "w")
    yield found
    found.close()


@pytest.mark.parametrize(
    "text",
    [
        "quality_mos > 3",
        "quality_mos BETWEEN 1 AND 4 OR generator IN ('one', 'two')",
        "CASE WHEN width > height THEN true ELSE prompt ILIKE '%fox%' END",
        "quality_rating_probs[5] >= 0.2 -- the share of excellent",
        "Quality_MOS::INTEGER % 2 = 0",
        "length(regexp_replace(prompt, '[^a-z]', '')) > 3",
    ],
)
def test_scalar_expressions_are_taken(scores, text):
    expression = scores.parse(text, "--where")
    assert expression.columns
    assert len(scores.con.execute(f"SELECT {expression.sql} FROM rows").fetchall()) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quality_mos >", "is not SQL"),
        (" ", "is empty"),
        ("true; DROP TABLE work", "is not SQL"),
        ("true FROM read_text('/etc/passwd')", "is not SQL"),
        ("true), (false", "is not one expression"),
        ("1) UNION SELECT (2", "is not one expression"),
        ("(SELECT content FROM read_text('/etc/passwd')) = ''", "holds a subquery"),
        ("id IN (SELECT id FROM rows)", "holds a subquery"),
        ("avg(quality_mos) OVER () > 3", "holds a window"),
        ("COLUMNS('.*') IS NOT NULL", "holds a star"),
        ("quality_mos > $1", "holds a parameter"),
        ("list_filter(quality_rating_probs, x -> x > 1) = []", "no column 'x'|holds a lambda"),
        ("quality_mos > random()", r"random\(\) does not give the same value"),
        ("now() > '2020-01-01'", r"now\(\) does not give the same value"),
        ("qualty_mos > 3", "did you mean quality_mos"),
        ("current_date > '2020-01-01'", "no column 'current_date'"),
    ],
)
def test_what_is_more_than_a_scalar_expression_is_refused(scores, text, said):
    with pytest.raises(UserError, match=said) as caught:
        scores.parse(text, "--where")
    assert "\n" not in str(caught.value)


def test_duckdb_itself_can_read_no_other_file(scores):
    import duckdb

    for query in ("FROM read_text('/etc/hostname')", "SET enable_external_access=true", "COPY rows TO '/tmp/rows.csv'"):
        with pytest.raises(duckdb.Error):
            scores.con.execute(query)


REFUSED = {
    "types": (["rows.where=prompt > 3 + quality_description"], "cannot be computed"),
    "aggregate": (["rows.where=avg(quality_mos) > 3"], "cannot be computed"),
    "value": (["rows.where=prompt::INTEGER > 3"], "TRY_CAST"),
    "unknown column": (["sample.size=2", "sample.strata=generater"], "did you mean generator"),
    "unknown key": (["best.per_promt=1"], "best.per_prompt"),
    "empty result": (["rows.where=quality_mos > 4.5"], "quality_mos > 4.5: leaves none of 3 rows"),
    "no condition": (["rows.where=quality_mos + 1"], "is of type FLOAT, not BOOLEAN"),
    "no number": (["quantile.top={quality_rating_probs: 0.5}"], "cannot be computed"),
    "aspect": (["rows.where=authenticity_mos > 1"], "authenticity_mos is null in every row"),
    "aspect in weights": (["composite.weights={correspondence_mos: 1}"], "correspondence_mos is null"),
    "no weights": (["composite.weights={quality_mos: 1, quality_mos_low: -1}"], "sum to 0"),
    "no states": (["duplicates.similarity=0.9"], "captured states of quality"),
    "no pairs": (["pairs.margin=3"], "pairs.margin=3"),
    "one prompt": (["rows.where=prompt = 'two'", "split.validation=0.5"], "leaves no prompt to train on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_exit_code_two_and_nothing_left(run_folder, tmp_path, capsys, case):
    overrides, said = REFUSED[case]
    out = tmp_path / "out"
    sets = [part for one in overrides for part in ("--set", one)]
    assert main(["curate", str(run_folder), "--out", str(out), *sets]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_mixed_fingerprints_are_refused(tmp_path):
    write_scores(tmp_path / "run", [scored("a", 4.0), scored("b", 4.0, fingerprint="another")])
    with pytest.raises(UserError, match="2 fingerprints"):
        curate(recipe(), str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no scores"):
        curate(recipe(), str(tmp_path / "nothing"), str(tmp_path / "out"))


def test_an_output_with_something_in_it_is_left_as_it_is(run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    curate(recipe(), str(run_folder), str(tmp_path / "out"))  # an empty folder will do
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is not empty"):
        curate(recipe(), str(run_folder), str(tmp_path / "out"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        curate(recipe(), str(run_folder), str(tmp_path / "file"))
    (tmp_path / "next.partial").mkdir()
    (tmp_path / "next.partial" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        curate(recipe(), str(run_folder), str(tmp_path / "next"))
    assert set(before) <= set(tmp_path.rglob("*"))
    assert (tmp_path / "next.partial" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["split", "Split"])
def test_a_corpus_column_of_our_name_is_refused(tmp_path, name):
    write_scores(tmp_path / "run", [scored("a", 4.0, **{name: "mine"})], passing=[pa.field(name, pa.string())])
    with pytest.raises(UserError, match="column 'split' already"):
        curate(recipe("split.validation=0.5"), str(tmp_path / "run"), str(tmp_path / "out"))


COMMANDS = {
    "curate": ["curate", "{run}", "--out", "{out}"],
    "export": ["export", "{run}", "--out", "{out}", "--format", "kohya"],
    "query": ["query", "{run}", "SELECT count(*) FROM scores"],
    "report": ["report", "{run}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_scores_that_sql_cannot_read_are_said_in_one_line(tmp_path, capsys, command):
    def refusal(run) -> str:
        assert main([part.format(run=run, out=tmp_path / "out") for part in COMMANDS[command]]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return error

    twins = write_scores(tmp_path / "twins", [scored("a", 4.0, Width=1)], passing=[pa.field("Width", pa.int64())])
    assert '--set corpus.drop=["Width"]' in refusal(twins)
    for broken in ("0_0", "1_0") if command in ("curate", "export") else ("0_0",):
        run = write_scores(tmp_path / broken, [scored("a", 4.0), scored("b", 4.0)])
        file = run / "scores" / f"{broken}.parquet"
        file.write_bytes(file.read_bytes()[:-100])
        told = refusal(run)
        assert "its scores cannot be read" in told
        assert file.name in told


def test_a_new_process_gives_the_same_bytes_and_flags_say_what_a_file_says(run_folder, tmp_path):
    from tests.curation.scored import files_of

    rules = tmp_path / "recipe.yaml"
    rules.write_text("rows: {where: [quality_mos > 2.5]}\nduplicates: {exact: true}\nsplit: {validation: 0.4}\n")
    flags = ["--where", "quality_mos > 2.5", "--set", "duplicates.exact=true", "split.validation=0.4"]
    command = ["curate", str(run_folder), "--config", str(rules), "--out", str(tmp_path / "file")]
    done = subprocess.run(
        [sys.executable, "-m", "m3agiqa.cli", *command], capture_output=True, text=True, check=True, timeout=300
    )
    assert "dropped" in done.stdout
    assert main(["curate", str(run_folder), *flags, "--out", str(tmp_path / "flags")]) == 0
    found = [files_of(tmp_path / name) for name in ("file", "flags")]
    assert all(made.pop("report.html") for made in found)  # it names the folder that it is in
    assert found[0] == found[1]
    assert set(found[0]) == {"curation.json", "removed.parquet", "scores/part-00000.parquet"}
    assert json.loads((tmp_path / "file" / "curation.json").read_text())["split"] == {"train": 1, "val": 1}
