"""How the files of a corpus are read on the way to pixels."""

import io
import os
import threading
import time

import pyarrow as pa
import pytest
from PIL import Image

import m3agiqa.decoding
from m3agiqa.apart import Apart, Died
from m3agiqa.config import AccessConfig, load_config
from m3agiqa.corpus import Access, open_corpus
from m3agiqa.decoding import decode_rows
from tests.corpora import write_corpus
from tests.deadly import deadly

LIMITS = load_config(None, []).images


class Files:
    """In place of a corpus's access: files that take their time, and how many were read at once, at most."""

    def __init__(self, seconds: float) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(stream, "PNG")
        self._data, self._seconds, self._lock = stream.getvalue(), seconds, threading.Lock()
        self._reading, self.at_once = 0, 0

    def fetch(self, uri: str) -> bytes:
        with self._lock:
            self._reading += 1
            self.at_once = max(self.at_once, self._reading)
        time.sleep(self._seconds)
        with self._lock:
            self._reading -= 1
        return self._data


def decoded(files: Files, root: str) -> pa.Table:
    uris = [f"{root}/{i}.png" for i in range(32)]
    rows = pa.table({"id": uris, "_uri": uris, "_bytes": pa.nulls(32, pa.binary())})
    return pa.concat_tables(decode_rows(rows, LIMITS, files, 8))


@pytest.mark.parametrize(
    ("root", "fast_s", "together"), [("/a", 60.0, False), ("/a", 0.0, True), ("s3://a", 60.0, True)]
)
def test_files_are_read_at_once_where_that_pays(monkeypatch, root, fast_s, together):
    monkeypatch.setattr(m3agiqa.decoding, "_FAST_READ_S", fast_s)
    files = Files(0.002)
    table = decoded(files, root)
    assert table["id"].to_pylist() == [f"{root}/{i}.png" for i in range(32)]
    assert set(table["_status"].to_pylist()) == {None}
    assert (files.at_once > 1) == together


def test_an_embedded_image_that_is_too_large_is_rejected():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    blobs = [buffer.getvalue(), buffer.getvalue() + bytes(2**20)]
    rows = pa.table({"id": ["0", "1"], "_uri": pa.nulls(2, pa.string()), "_bytes": pa.array(blobs, pa.large_binary())})
    table = pa.concat_tables(decode_rows(rows, LIMITS, Access((), AccessConfig(max_mib=1))))
    assert table["_status"].to_pylist() == [None, "rejected"]
    assert "the embedded image has 1.0 MiB, more than access.max_mib=1; to allow it" in table["_error"][1].as_py()


def test_a_row_that_kills_the_process_which_decodes_it_is_failed_where_care_is_taken(tmp_path):
    corpus = open_corpus(write_corpus(tmp_path / "in", 9))
    (rows,) = corpus.shards[0].read()
    plain = list(decode_rows(rows, LIMITS, corpus.access, 4))
    careful = list(decode_rows(rows, LIMITS, deadly(corpus.access, "5.png"), 4, careful=True))
    assert [part.num_rows for part in careful] == [4, 4, 1]
    before, after = pa.concat_tables(plain), pa.concat_tables(careful)
    others = [i for i in range(9) if i != 5]
    assert after.take(others).equals(before.take(others))
    assert (after["id"][5].as_py(), after["_status"][5].as_py()) == ("row 5", "failed")
    assert "this row alone died" in after["_error"][5].as_py()


def test_what_is_called_apart_may_print_raise_and_die():
    with Apart() as apart:
        assert apart.call(print, "not an answer") is None
        with pytest.raises(ValueError, match="invalid literal"):
            apart.call(int, "x")
        with pytest.raises(Died):
            apart.call(os._exit, 3)
        assert apart.call(int, "7") == 7
