"""`m3agiqa report`: one file, whole and safe, from any folder of scores."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m3agiqa.cli import main
from m3agiqa.config import AccessConfig
from m3agiqa.report import report_after, write_report
from m3agiqa.report.page import script_json
from m3agiqa.report.pictures import Places, thumbnails
from tests.corpora import encode, picture, write_tar
from tests.scored import SCRIPT, curate_by_hand, scored_folder


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their text, and what it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.loads, self._raw = "", [], [], ""
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag in ("script", "style"):
            self._raw = tag
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if self._raw:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def rows(self) -> list[dict]:
        return json.loads(self.scripts[1])


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return scored_folder(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(scores):
    write_report(str(scores))
    return Page(scores / "report.html")


def test_it_needs_nothing_but_itself(page, scores):
    assert not page.loads
    source = (scores / "report.html").read_text()
    assert not re.search(r"url\(|@import|<link|<iframe", source)
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_texts_of_users_stay_text(page):
    assert len(page.scripts) == 3, "style, data and our own script"
    assert "img" not in {tag for tag, _ in page.tags}
    row = next(row for row in page.rows if row["prompt"] == SCRIPT)
    assert row["aspects"][0]["description"].endswith(f"<i>{SCRIPT}</i>")
    assert SCRIPT[:20] in page.text
    assert "the store said <b>no</b>" in page.text


def test_json_inside_a_script_cannot_end_it():
    text = "</script><!-- &amp; \u2028"
    assert not set("<>&\u2028") & set(script_json([text]))
    assert json.loads(script_json([text])) == [text]


def test_every_picture_can_be_reached_by_keyboard_and_has_a_name(page):
    buttons = [attributes for tag, attributes in page.tags if tag == "button" and "data-row" in attributes]
    assert len(buttons) > 100
    assert all(int(attributes["data-row"]) < len(page.rows) for attributes in buttons)
    assert all(attributes["title"] for attributes in buttons)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert named <= set(ids)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")


def test_what_it_says(page, scores):
    for words in ("40 rows", "38", "Best quality", "Worst authenticity", "Borderline correspondence", "alpha", "beta"):
        assert words in " ".join(page.text.split())
    assert "there is no such file" in page.text
    assert "12.5 images/s" in page.text
    manifest = json.loads((scores / "run.json").read_text())
    assert manifest["fingerprint"] in page.text
    assert not [a for _, a in page.tags if a.get("id") in ("curation", "drift")]


def test_pictures_are_small_and_a_missing_one_says_why(page):
    assert all(row["src"].startswith("data:image/webp;base64,") for row in page.rows)
    assert len({row["src"] for row in page.rows}) == 6


def test_a_missing_picture_says_why(tmp_path):
    folder = scored_folder(tmp_path / "run", 8)
    (tmp_path / "pictures" / "2.png").unlink()
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    write_report(str(folder))
    reasons = {row["id"]: row["reason"] for row in Page(folder / "report.html").rows if row["src"] is None}
    assert "no such file" in reasons["row-0002"]
    assert "not an image" in reasons["row-0003"]


def test_the_same_scores_give_the_same_page(scores, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(str(scores), out=str(tmp_path / name))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_curated_folder_shows_its_funnel(tmp_path):
    folder, scores = scored_folder(tmp_path / "chosen", 20), scored_folder(tmp_path / "run", 30)
    curate_by_hand(folder, 20)
    write_report(str(folder), against=str(scores))
    page = Page(folder / "report.html")
    assert "What the curation kept" in page.text
    assert "near <b>duplicates</b>" in page.text
    assert "recipe_hash" in page.text
    assert "Both have the same fingerprint" in page.text
    assert all(row["src"] for row in page.rows)


def test_drift_against_another_run(scores, tmp_path, capsys):
    other = scored_folder(tmp_path / "other", 30, shift=0.4)
    out = str(tmp_path / "drift.html")
    assert main(["report", str(scores), "--against", str(other), "--out", out]) == 0
    assert out in capsys.readouterr().out
    page = Page(tmp_path / "drift.html")
    assert f"Drift from {other}" in page.text
    assert "Both have the same fingerprint" in page.text
    assert page.text.count("Kolmogorov") == 3


def test_scores_of_another_kind_are_not_compared(scores, tmp_path):
    other = scored_folder(tmp_path / "other", 30, predictor=False)
    write_report(str(scores), against=str(other), out=str(tmp_path / "drift.html"))
    assert "No aspect has scores of the same kind in both" in Page(tmp_path / "drift.html").text


def test_rows_that_all_failed_make_a_report_too(tmp_path):
    folder = scored_folder(tmp_path / "run", 20)
    table = pq.read_table(folder / "scores")
    bad = table.filter(pa.compute.not_equal(table["status"], "ok"))
    (folder / "scores" / "1.parquet").unlink()
    nothing = {name: pa.nulls(bad.num_rows, bad.schema.field(name).type) for name in bad.column_names if "_mos" in name}
    for name, column in nothing.items():
        bad = bad.set_column(bad.column_names.index(name), bad.schema.field(name), column)
    pq.write_table(bad, folder / "scores" / "0.parquet")
    write_report(str(folder))
    page = Page(folder / "report.html")
    assert "there is no such file" in page.text
    assert page.rows == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{tmp}/empty"], "holds no scores"),
        (["{scores}", "--against", "{tmp}/empty"], "holds no scores"),
        (["{scores}", "--out", "{tmp}"], "is no file name"),
        (["{scores}", "--out", "{tmp}/no/such/folder/r.html"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(scores, tmp_path, capsys, args, said):
    (tmp_path / "empty").mkdir()
    code = main(["report", *[arg.format(tmp=tmp_path, scores=scores) for arg in args]])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_report_that_cannot_be_made_is_a_note_at_the_end_of_a_run(tmp_path):
    folder = scored_folder(tmp_path / "run", 12)
    (folder / "curation.json").write_text("{")
    line = report_after(str(folder))
    assert line.startswith("note: no report was made (")
    assert "curation.json" in line
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("run.json", "config", {"access": {"htp": True}}, "its config: access.htp cannot be read (Extra inputs"),
        ("run.json", "config", {"corpus": "in"}, "its config cannot be read"),
        ("curation.json", "origin", "in.csv", "its origin cannot be read"),
    ],
)
def test_what_says_nothing_of_where_pictures_are_is_said_in_one_line(tmp_path, capsys, name, key, value, said):
    folder = scored_folder(tmp_path / "run", 12)
    if name == "curation.json":
        curate_by_hand(folder, 12)
    sheet = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(sheet | {key: value}))
    assert main(["report", str(folder)]) == 2
    told = capsys.readouterr().err
    assert f"{name}: {said}" in told
    assert len(told.splitlines()) == 1


def test_a_manifest_that_lost_its_pictures_gives_a_reason(tmp_path):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "in.parquet")
    (made,) = thumbnails({"a": "in.parquet#0"}, Places(str(tmp_path / "in.parquet"))).values()
    assert "no column of images" in made.reason


def test_embedded_pictures_are_read_where_the_run_found_them(tmp_path):
    (tmp_path / "in").mkdir()
    blobs = [encode(picture(40, 40, seed=i)) for i in range(50)]
    structs = pa.array([{"bytes": blob, "path": None} for blob in blobs])
    pq.write_table(pa.table({"image": structs}), tmp_path / "in" / "a.parquet", row_group_size=20)
    places = Places(str(tmp_path / "in"))
    found = thumbnails({"x": "a.parquet#3", "y": "a.parquet#47", "z": "a.parquet#99", "n": None}, places)
    assert found["x"].uri != found["y"].uri
    assert found["x"].uri == thumbnails({"q": "a.parquet#3"}, places)["q"].uri
    assert "no row 99" in str(found["z"].reason)
    assert "names no image" in str(found["n"].reason)
    assert "not known" in str(thumbnails({"x": "a.parquet#3"}, Places())["x"].reason)


def test_pictures_that_the_run_could_not_have_read_are_not_shown(tmp_path):
    mine, folder = tmp_path / "mine.png", scored_folder(tmp_path / "run", 8)
    picture(40, 40).save(mine)
    (tmp_path / "pictures" / "2.png").unlink()
    (tmp_path / "pictures" / "2.png").symlink_to(mine)
    write_report(str(folder))
    reasons = {row["id"]: row["reason"] for row in Page(folder / "report.html").rows if row["src"] is None}
    assert "leads outside of the corpus" in reasons["row-0002"]
    assert "row-0003" not in reasons


def test_pictures_in_tars(tmp_path):
    blob = encode(picture(40, 40))
    write_tar(tmp_path / "s.tar", [("a.png", blob), ("a.txt", b"a fox")])
    places = Places(str(tmp_path / "s.tar"))
    found = thumbnails({"a": "s.tar::a.png", "b": "s.tar::b.png"}, places)
    assert found["a"].uri
    assert found["b"].reason
    # Noise does not compress: the run rejected it for its size, and so it is not read whole here.
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8))
    write_tar(tmp_path / "s.tar", [("c.png", encode(large)), ("a.png", blob)])
    small = Places(str(tmp_path / "s.tar"), access=AccessConfig(max_mib=1))
    found = thumbnails({"c": "s.tar::c.png", "a": "s.tar::a.png"}, small)
    assert found["c"].reason
    assert found["a"].uri
    (tmp_path / "s.tar").write_bytes(b"no tar")
    assert thumbnails({"a": "s.tar::a.png"}, places)["a"].reason


def test_pictures_that_take_too_long_are_left_out(scores):
    made = thumbnails({"a": str(scores.parent / "pictures" / "0.png")}, Places(), budget_s=0.0)
    assert "took more than" in str(made["a"].reason)
