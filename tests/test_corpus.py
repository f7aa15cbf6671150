import functools
import gzip
import http.server
import io
import os
import pickle
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.config import AccessConfig, ImageConfig
from m3agiqa.corpus import open_corpus
from m3agiqa.corpus.files import base_of, fetch
from m3agiqa.corpus.rows import BYTES_PER_TABLE
from m3agiqa.decoding import decode_rows
from tests.corpora import encode, picture, read, refusal, rows_of, write_tar, written

# ---- folders


def test_a_folder_of_images(tmp_path):
    for name in ("b/two.PNG", "b/x.y.jpeg", "a.webp", "broken.jpg", ".hidden.png", ".git/no.png", "notes.md"):
        written(tmp_path / name, b"x")
    written(tmp_path / "b/two.txt", "\ufeffa cat <image>\n")
    written(tmp_path / "b/x.y.txt", "caf\xe9".encode("cp1252"))
    written(tmp_path / "a.txt", " \n")
    written(tmp_path / "metadata.csv", "file_name\na.webp\n")
    corpus = open_corpus(str(tmp_path))
    rows = {row["id"]: row for row in read(corpus)}
    assert list(rows) == ["a.webp", "b/two.PNG", "b/x.y.jpeg", "broken.jpg"]
    prompts = [row["prompt"] for row in rows.values()]
    assert prompts == [None, "a cat <image>", "caf\xe9", None]
    assert rows["b/two.PNG"]["_uri"] == rows["b/two.PNG"]["image"] == str(tmp_path / "b/two.PNG")
    assert rows["a.webp"]["_bytes"] is None
    assert "metadata.csv is not read" in corpus.notes[0]
    assert "2 files" in corpus.notes[1]


def test_a_folder_is_cut_into_shards(tmp_path):
    for i in range(25):
        written(tmp_path / f"{i:03d}.png", b"")
    corpus = open_corpus(str(tmp_path), rows_per_shard=10)
    assert len(corpus.shards) == 3
    assert [row["id"] for row in read(corpus)] == [f"{i:03d}.png" for i in range(25)]
    assert len(pickle.dumps(corpus.shards[0])) < 4000


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    written(tmp_path / "elsewhere/1.png", b"")
    (tmp_path / "top").mkdir()
    (tmp_path / "top/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "top")
    assert [row["id"] for row in rows_of(tmp_path / "top")] == ["link/1.png"]


def test_the_folder_of_an_input_is_known_when_it_is_gone(tmp_path):
    (tmp_path / "v1.5 [old]").mkdir()
    (tmp_path / "v1.5 [old]" / "list").write_text("")
    inputs = {"v1.5 [old]": "v1.5 [old]", "v1.5 [old]/list": "v1.5 [old]", "gone/a.csv": "gone", "gone": "gone"}
    inputs |= {"gone/*.tar": "gone", "gone/part-{0..9}/x.tar": "gone", "gone/a*/**/b.png": "gone"}
    assert {name: base_of(f"{tmp_path}/{name}") for name in inputs} == {
        name: f"{tmp_path}/{folder}" for name, folder in inputs.items()
    }
    assert base_of("memory://store/gone/*.tar") == "memory://store/gone"


def test_one_image_and_file_uris_and_globs(tmp_path, monkeypatch):
    written(tmp_path / "a b#1/x%.png", b"1")
    written(tmp_path / "a b#1/y.png", b"2")
    written(tmp_path / "a b#1/[z].png", b"3")
    written(tmp_path / "a b#1/deep/er/z.png", b"3")
    monkeypatch.chdir(tmp_path)
    assert [row["id"] for row in rows_of("a b#1/y.png")] == ["y.png"]
    assert [row["_uri"] for row in rows_of("a b#1/[z].png")] == [str(tmp_path / "a b#1/[z].png")]
    assert len(rows_of("file://" + str(tmp_path / "a b#1").replace(" ", "%20"))) == 4
    assert [row["id"] for row in rows_of("a b#1/[xy]*.png")] == ["x%.png", "y.png"]
    assert [row["id"] for row in rows_of("a b#1/**/*.png")] == ["[z].png", "deep/er/z.png", "x%.png", "y.png"]
    assert [row["id"] for row in rows_of("a b#1/{x%,y}.png")] == ["x%.png", "y.png"]
    assert {fetch(row["_uri"]) for row in rows_of("a b#1")} == {b"1", b"2", b"3"}


def test_what_is_no_corpus(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty")
    written(tmp_path / "docs/readme.md", "x")
    assert "no images" in refusal(tmp_path / "docs")
    assert ".md" in refusal(tmp_path / "docs/readme.md")
    assert "no file matches" in refusal(tmp_path / "*.png")
    written(tmp_path / "mixed/a.png", "x")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "mixed/b.parquet")
    assert "either could be meant" in refusal(tmp_path / "mixed")
    assert "nosuchscheme" in refusal("nosuchscheme://bucket/x.png")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path):
    written(tmp_path / "a.png", "x")
    (tmp_path / "locked").mkdir(mode=0)
    assert "cannot be read" in refusal(tmp_path)


# ---- tars


def test_webdataset_tars(tmp_path):
    image = encode(picture())
    details = '{"caption": "from json", "generator": "g", "seed": 7}'
    members = [
        ("./a/1.png", image),
        ("./a/1.txt", b"from text\n"),
        ("a/2.jpg", b"broken"),
        ("a/2.json", details.encode()),
        ("a/._2.jpg", b"apple"),
        ("3.png", image),
        ("3.cls", b"5"),
        ("v0.85.png", image),
        ("v0.85.txt", b"dots"),
        ("v0.9.png", image),
        ("1.webp", image),
        ("1.png", image),
        ("1.json", b"{not json"),
    ]
    for name in ("0000", "0001"):
        write_tar(tmp_path / f"{name}.tar", members)
    corpus = open_corpus(str(tmp_path))
    assert corpus.rows is None
    assert len(corpus.shards) == 2
    rows = read(corpus)
    first = {row["id"]: row for row in rows[: len(rows) // 2]}
    assert list(first) == [f"0000/{key}" for key in ("a/1", "a/2", "3", "v0.85", "v0.9", "1", "1#2")]
    assert [row["prompt"] for row in first.values()] == ["from text", "from json", None, "dots", None, None, None]
    assert first["0000/a/2"]["json"] == details
    assert first["0000/a/2"]["generator"] == "g"
    assert first["0000/1"]["json"] == "{not json"
    assert first["0000/a/1"]["image"] == "0000.tar::a/1.png"
    assert first["0000/a/1"]["_bytes"] == image
    assert first["0000/a/1"]["_uri"] is None
    pattern = tmp_path / "{0000..0001}.tar"
    assert rows_of(pattern) == rows_of(tmp_path / "*.tar") == rows
    assert "0002.tar" in refusal(tmp_path / "{0000..0002}.tar")
    assert "json" not in open_corpus(str(tmp_path), drop=["json"]).schema.names
    assert "'json' cannot pass through" in refusal(tmp_path, reserved=["json"])


def test_tars_are_read_in_bounded_tables(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", bytes(3 * 2**20)) for i in range(24)])
    corpus = open_corpus(str(tmp_path / "a.tar"))
    sizes = [table.nbytes for table in corpus.shards[0].read()]
    assert len(sizes) == 3
    assert max(sizes) < BYTES_PER_TABLE + 4 * 2**20


def packed(path: Path, members: list[tuple[str, int, bytes]]) -> Path:
    """A compressed tar of members that are a short beginning and then zeros."""
    with tarfile.open(path, "w:gz") as tar:
        for name, size, data in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(data + bytes(size - len(data))))
    return path


def test_a_member_of_a_tar_that_is_too_large_is_a_row_that_says_so(tmp_path):
    image, large = encode(picture()), 3 * 2**20 + 2**19
    members = [
        ("0.png", len(image), image),
        ("1.png", large, image), ("1.txt", 3, b"fox"),
        ("2.png", len(image), image), ("2.txt", large, b""),
        ("3.json", large, b"{}"), ("3.png", len(image), image),
        ("4.png", 2 * 2**20, image), ("4.txt", 3, b"owl"),
    ]  # fmt: skip
    path = packed(tmp_path / "a.tar.gz", members)
    assert path.stat().st_size < 10**5
    corpus = open_corpus(str(path), access=AccessConfig(max_mib=2))
    rows = read(corpus)
    assert [row["id"] for row in rows] == [f"a/{i}" for i in range(5)]
    assert [row["_bytes"] is None for row in rows] == [False, True, True, True, False]
    assert [row["prompt"] for row in rows] == [None, "fox", None, None, "owl"]
    (table,) = corpus.shards[0].read()
    decoded = pa.concat_tables(decode_rows(table, ImageConfig(), corpus.access))
    assert decoded["_status"].to_pylist() == [None, "rejected", "rejected", "rejected", None]
    what = "has 3.5 MiB, more than access.max_mib=2; to allow it: --set access.max_mib=4"
    for place, member in ((1, "1.png"), (2, "2.txt"), (3, "3.json")):
        assert decoded["_error"][place].as_py() == f"not read: a.tar.gz::{member} {what}"
    assert read(open_corpus(str(path), access=AccessConfig(max_mib=4)))[1]["_bytes"] == image + bytes(
        large - len(image)
    )


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_a_tar_is_not_read_whole_whatever_its_size(tmp_path, kind):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2 * 2**20
    content = info.tobuf() + bytes(info.size) + bytes(tarfile.RECORDSIZE)
    path = written(tmp_path / "a.tar.gz", gzip.compress(content))
    assert "not a readable tar: it has a header of 2 MiB" in refusal(path)


def test_bad_tars(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [("1.png", bytes(5000)), ("2.png", bytes(5000))]).read_bytes()
    assert "not a readable tar" in refusal(written(tmp_path / "b.tar", whole[:7000]))
    assert "not a readable tar" in refusal(written(tmp_path / "c.tar", b"<html>" * 1000))
    assert "no images" in refusal(write_tar(tmp_path / "d.tar", [("1.txt", b"x")]))
    apart = write_tar(tmp_path / "e.tar", [("1.png", b"x"), ("2.png", b"x"), ("1.txt", b"p"), ("2.txt", b"q")])
    assert "do not stand next to each other" in refusal(apart)


# ---- files


def test_fetch(tmp_path):
    assert fetch(str(written(tmp_path / "a b%20#?.png", b"data"))) == b"data"
    assert fetch(f"file://{written(tmp_path / 'x y.png', b'more')}".replace(" ", "%20")) == b"more"
    bad = [tmp_path / "no.png", tmp_path, tmp_path / "x y.png" / "z", "x" * 5000, "a\0b", "nosuchscheme://h/x"]
    for name in bad:
        with pytest.raises(FileNotFoundError):
            fetch(str(name))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_fetch_lets_the_systems_faults_through(tmp_path):
    written(tmp_path / "a.png", b"x").chmod(0)
    with pytest.raises(PermissionError):
        fetch(str(tmp_path / "a.png"))


def test_http(tmp_path):
    written(tmp_path / "a b.png", b"image")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        rows = rows_of(written(tmp_path / "m.csv", f"url\n{host}/a%20b.png?x=1\n{host}/none.png\n"))
        assert fetch(rows[0]["_uri"]) == b"image"
        with pytest.raises(FileNotFoundError):
            fetch(rows[1]["_uri"])
        server.shutdown()
        server.server_close()
        with pytest.raises(OSError, match=r"(?i)connect") as caught:  # nobody there: worth another try
            fetch(rows[0]["_uri"])
        assert not isinstance(caught.value, FileNotFoundError)


def test_fsspec_is_the_last_resort():
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/corpus/a b.png", b"image")
    store.pipe_file("/corpus/a b.txt", b"prompt")
    store.pipe_file("/corpus/m.csv", b"image\na b.png\nmemory://corpus/a b.png\nno.png\n")
    rows = rows_of("memory://corpus")
    assert [(row["id"], row["prompt"], fetch(row["_uri"])) for row in rows] == [("a b.png", "prompt", b"image")]
    rows = rows_of("memory://corpus/m.csv")
    assert [fetch(row["_uri"]) for row in rows[:2]] == [b"image", b"image"]
    with pytest.raises(FileNotFoundError):
        fetch(rows[2]["_uri"])


def test_s3(bucket, tmp_path):
    image, root = encode(picture()), "s3://m3agiqa-corpus"
    bucket("folder/a b#1?.png", image)
    bucket("folder/a b#1?.txt", b"a prompt")
    bucket("folder/deep/c.jpg", b"broken")
    bucket("m/manifest.csv", b"image,prompt\n../folder/a b#1?.png,p\nmissing.png,q\n")
    for part in range(3):
        pq.write_table(pa.table({"image": [image, image], "n": [part, 9]}), tmp_path / "p.parquet")
        bucket(f"parts/{part}.parquet", (tmp_path / "p.parquet").read_bytes())
        bucket(f"tars/{part:04d}.tar", write_tar(tmp_path / "t.tar", [("k.png", image), ("k.txt", b"t")]).read_bytes())

    rows = rows_of(f"{root}/folder")
    assert [(row["id"], row["prompt"]) for row in rows] == [("a b#1?.png", "a prompt"), ("deep/c.jpg", None)]
    assert [fetch(row["_uri"]) for row in rows] == [image, b"broken"]
    assert len(rows_of(f"{root}/folder/*.png")) == 1
    assert len(rows_of(f"{root}/folder/a b#1?.png")) == 1
    rows = rows_of(f"{root}/m/manifest.csv")
    assert fetch(rows[0]["_uri"]) == image
    with pytest.raises(FileNotFoundError):
        fetch(rows[1]["_uri"])
    rows = rows_of(f"{root}/parts")
    assert [(row["image"], row["n"]) for row in rows][2:4] == [("1.parquet#0", 1), ("1.parquet#1", 9)]
    assert rows[0]["_bytes"] == image
    rows = rows_of(root + "/tars/{0000..0002}.tar")
    assert [(row["id"], row["prompt"]) for row in rows] == [(f"{part:04d}/k", "t") for part in range(3)]
    assert "0003.tar" in refusal(root + "/tars/{0002..0003}.tar")
    assert "does not exist" in refusal(f"{root}/nowhere")
    assert "does not exist" in refusal("s3://no-such-bucket-here/x")


def test_s3_options_in_the_uri(bucket):
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    bucket("options/a.png", b"1")
    bucket("options/m.csv", b"image\na.png\n")
    options = f"?scheme=http&endpoint_override={endpoint}&region=us-east-1"
    for uri in (f"s3://m3agiqa-corpus/options{options}", f"s3://m3agiqa-corpus/options/*.csv{options}"):
        rows = rows_of(uri)
        assert [fetch(row["_uri"]) for row in rows] == [b"1"]
